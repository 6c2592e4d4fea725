"""The joint product against the plain one, segment by segment: outputs and every gradient."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

from lorica.functional import drop_rate
from lorica.tune.population.joint_layers import Segment, joint_linear, segment

D_IN, D_OUT = 6, 5


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def segments() -> list[Segment]:
    """Of other shapes and ranks, one of them without an update, one with dropout."""
    dropped = segment(leaf(3, D_IN), leaf(2, D_IN), leaf(D_OUT, 2), 1.5, 0.5)
    assert dropped.mask is not None
    assert 0 < dropped.mask.sum() < dropped.mask.numel()
    return [
        Segment(leaf(2, 3, D_IN), leaf(1, D_IN), leaf(D_OUT, 1), 2.0),
        Segment(leaf(4, D_IN)),
        dropped,
    ]


def alone(part: Segment, weight: Tensor, bias: Tensor | None) -> Tensor:
    if part.A is None or part.B is None:
        return part.x @ weight.T + (0 if bias is None else bias)
    keep = None if part.mask is None else part.mask.to(part.x.dtype).view_as(part.x)
    return oracle.lora_linear(part.x, weight, bias, part.A, part.B, part.scale, keep)


def gradients(outputs: list[Tensor], parts: list[Segment]) -> list[Tensor]:
    leaves = [t for part in parts for t in (part.x, part.A, part.B) if t is not None]
    return list(torch.autograd.grad([(y**2).sum() for y in outputs], leaves))


@pytest.mark.parametrize("with_bias", [True, False])
def test_equal_to_each_segment_by_itself(with_bias: bool) -> None:
    parts, weight = segments(), torch.randn(D_OUT, D_IN, dtype=torch.float64)
    bias = torch.randn(D_OUT, dtype=torch.float64) if with_bias else None
    found = joint_linear(parts, weight, bias)
    expected = [alone(part, weight, bias) for part in parts]
    for y, want in zip(found, expected, strict=True):
        torch.testing.assert_close(y, want)
    for got, want in zip(gradients(list(found), parts), gradients(expected, parts), strict=True):
        torch.testing.assert_close(got, want)


def test_the_scale_makes_up_for_what_dropout_leaves_out() -> None:
    part = segment(leaf(3, D_IN), leaf(2, D_IN), leaf(D_OUT, 2), 1.5, 0.5)
    assert part.scale == 1.5 / (1 - drop_rate(0.5))


def test_a_segment_whose_loss_never_comes_changes_nothing_for_the_others() -> None:
    parts, weight = segments(), torch.randn(D_OUT, D_IN, dtype=torch.float64)
    found = joint_linear(parts, weight, None)
    torch.autograd.backward([found[0].sum(), found[2].sum()])
    assert parts[1].x.grad is None
    expected = gradients_of_sum(alone(parts[0], weight, None), parts[0])
    for got, want in zip((parts[0].x, parts[0].A, parts[0].B), expected, strict=True):
        assert got is not None
        assert got.grad is not None
        torch.testing.assert_close(got.grad, want)


def gradients_of_sum(y: Tensor, part: Segment) -> list[Tensor]:
    assert part.A is not None
    assert part.B is not None
    return list(torch.autograd.grad(y.sum(), [part.x, part.A, part.B]))


def test_inputs_that_need_no_gradient_get_none() -> None:
    parts = [
        Segment(torch.randn(2, D_IN), leaf(1, D_IN, dtype=torch.float32), torch.randn(D_OUT, 1)),
        Segment(torch.randn(3, D_IN)),
    ]
    first, second = joint_linear(parts, torch.randn(D_OUT, D_IN), None)
    (first.sum() + second.sum()).backward()
    assert parts[0].A is not None
    assert parts[0].A.grad is not None
    assert all(part.x.grad is None for part in parts)


def test_outputs_may_be_changed_in_place() -> None:
    # Each is its own to autograd, though they lie in one buffer.
    parts, weight = segments(), torch.randn(D_OUT, D_IN, dtype=torch.float64)
    first, second, _ = joint_linear(parts, weight, None)
    kept = second.detach().clone()
    first.mul_(2).sum().backward()
    torch.testing.assert_close(second.detach(), kept)
    torch.testing.assert_close(
        parts[0].x.grad, 2 * gradients_of_sum(alone(parts[0], weight, None), parts[0])[0]
    )


def test_what_is_saved_is_what_each_would_save() -> None:
    parts, saved = segments(), []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        joint_linear(parts, weight, None)
    own = [t for t in saved if t.data_ptr() != weight.data_ptr()]
    inputs = {t.data_ptr() for part in parts for t in part if isinstance(t, Tensor)}
    # The segment without an update keeps nothing; the others, beside their inputs, A·x̃ alone.
    assert parts[1].x.data_ptr() not in {t.data_ptr() for t in own}
    assert [t.shape for t in own if t.data_ptr() not in inputs] == [(6, 1), (3, 2)]
