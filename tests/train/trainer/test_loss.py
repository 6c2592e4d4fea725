from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import lorica
from lorica.errors import ConfigError, StateError
from lorica.train.trainer.loss import LinearHead, chunked_cross_entropy

WIDTH, CLASSES = 8, 37


def drawn(tokens: int, ignored: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows for a head, and targets of which a share is ignored."""
    hidden = torch.randn(tokens, WIDTH, dtype=dtype, requires_grad=True)
    target = torch.randint(CLASSES, (tokens,))
    target[torch.rand(tokens) < ignored] = -100
    return hidden, target


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(3 * loss, inputs))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@given(
    tokens=st.integers(1, 40),
    chunk=st.integers(1, 50),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    linear=st.booleans(),
    cap=st.booleans(),
    bias=st.booleans(),
    ignore_index=st.sampled_from([-100, 5]),
)
def test_equals_torchs(
    tokens: int,
    chunk: int,
    ignored: float,
    smoothing: float,
    reduction: str,
    linear: bool,
    cap: bool,
    bias: bool,
    ignore_index: int,
) -> None:
    hidden, target = drawn(tokens, ignored)
    target[0] = 1
    target[target == -100] = ignore_index
    head = nn.Linear(WIDTH, CLASSES, bias, dtype=torch.float64)
    parameters = list(head.parameters())
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": smoothing,
    }
    after = (lambda logits: 2 * torch.tanh(logits / 2)) if cap else (lambda logits: logits)
    plain = F.cross_entropy(after(head(hidden)), target, **options)
    given = LinearHead(*parameters) if linear else head
    own = chunked_cross_entropy(given, hidden, target, parameters, after=after, chunk=chunk, **options)
    torch.testing.assert_close(own, plain, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(own, hidden, *parameters), gradients(plain, hidden, *parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# Relative to the whole tensor: the loss, the gradient of hidden, that of the head's weight. In bfloat16 both
# sides round (2⁻⁹ = 0.002 an element), this one once more, and the weight's gradient once a chunk.
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerances"),
    [(torch.float64, (1e-10,) * 3), (torch.float32, (1e-6,) * 3), (torch.bfloat16, (1e-6, 5e-3, 1e-2))],
)
def test_precision(linear: bool, dtype: torch.dtype, tolerances: tuple[float, float, float]) -> None:
    hidden, target = drawn(600, dtype=dtype)
    head = nn.Linear(WIDTH, CLASSES, dtype=dtype)
    given = LinearHead(head.weight, head.bias) if linear else head
    upcast = torch.promote_types(dtype, torch.float32)
    plain = F.cross_entropy(head(hidden).to(upcast), target)
    own = chunked_cross_entropy(given, hidden, target, [head.weight], chunk=64)
    assert own.dtype == upcast
    found = [own, *gradients(own, hidden, head.weight)]
    expected = [plain, *gradients(plain, hidden, head.weight)]
    for a, b, tolerance in zip(found, expected, tolerances, strict=True):
        assert distance(a, b) <= tolerance


def test_gradcheck() -> None:
    hidden, target = drawn(7)
    weight = torch.randn(CLASSES, WIDTH, dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_cross_entropy(lambda x: x @ weight.t(), hidden, target, [weight], chunk=3)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_any_head_that_treats_rows_alone() -> None:
    hidden, target = drawn(20)
    head = nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.Tanh()).double()
    own = chunked_cross_entropy(lambda x: 30 * head(x), hidden, target, list(head.parameters()), chunk=6)
    plain = F.cross_entropy(30 * head(hidden), target)
    for a, b in zip(
        gradients(own, hidden, *head.parameters()),
        gradients(plain, hidden, *head.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("linear", [False, True])
def test_only_what_is_asked_for(linear: bool) -> None:
    hidden, target = drawn(20)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    head.weight.requires_grad_(False)
    given, parameters = LinearHead(head.weight, head.bias) if linear else head, list(head.parameters())
    chunked_cross_entropy(given, hidden, target, parameters).backward()
    assert head.weight.grad is None
    assert head.bias.grad is not None
    expected, head.bias.grad, hidden.grad = head.bias.grad, None, None
    chunked_cross_entropy(given, hidden.detach(), target, parameters).backward()
    assert hidden.grad is None
    torch.testing.assert_close(head.bias.grad, expected)


def test_a_parameter_the_head_does_not_read() -> None:
    hidden, target = drawn(20)
    head, other = nn.Linear(WIDTH, CLASSES, dtype=torch.float64), nn.Parameter(torch.ones(2))
    chunked_cross_entropy(head, hidden, target, [head.weight, other]).backward()
    assert other.grad is None
    assert head.weight.grad is not None


def test_no_gradient_without_grad_mode() -> None:
    hidden, target = drawn(20)
    calls = []

    def head(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x @ torch.ones(WIDTH, CLASSES, dtype=x.dtype)

    with torch.no_grad():
        loss = chunked_cross_entropy(head, hidden, target, chunk=10)
    assert not loss.requires_grad
    assert not any(calls)


def test_no_targets() -> None:
    hidden, target = drawn(5, ignored=2.0)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    loss = chunked_cross_entropy(head, hidden, target, reduction="sum")
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert chunked_cross_entropy(head, hidden, target).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_targets_train_nothing(
    reduction: str, smoothing: float, linear: bool, autocast: bool, tokens: int
) -> None:
    hidden, target = drawn(tokens, ignored=2.0, dtype=torch.float32)
    layer = nn.Linear(WIDTH, CLASSES)
    head = LinearHead(layer.weight, layer.bias) if linear else layer
    own: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    with torch.autocast("cpu", enabled=autocast):
        losses = (
            chunked_cross_entropy(head, hidden, target, [*layer.parameters()], **own),
            F.cross_entropy(layer(hidden), target, **own),
        )
    torch.testing.assert_close(*losses, equal_nan=True)
    asked = [hidden, *layer.parameters()]
    for share in (1.0, 1 / torch.tensor(0.0)):  # the other way to a mean: a sum over the count of targets
        for loss in losses:
            found = torch.autograd.grad(share * loss, asked, retain_graph=True)
            if loss is losses[0] or smoothing == 0 or reduction == "sum":
                assert not any(gradient.any() for gradient in found)


def test_head_never_sees_ignored_rows() -> None:
    hidden, target = drawn(50, ignored=0.6)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    seen = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal seen
        seen += len(x)
        return head(x)

    chunked_cross_entropy(counted, hidden, target, chunk=8).backward()
    assert seen == (target != -100).sum()


def test_backward_twice() -> None:
    hidden, target = drawn(10)
    loss = chunked_cross_entropy(nn.Linear(WIDTH, CLASSES, dtype=torch.float64), hidden, target)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, hidden)
    torch.testing.assert_close(second, 2 * first)


def test_second_derivatives_are_refused() -> None:
    hidden, target = drawn(10)
    loss = chunked_cross_entropy(nn.Linear(WIDTH, CLASSES, dtype=torch.float64), hidden, target)
    with pytest.raises(StateError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_unknown_reduction() -> None:
    hidden, target = drawn(3)
    with pytest.raises(ConfigError, match="reduction must be"):
        chunked_cross_entropy(nn.Linear(WIDTH, CLASSES), hidden, target, reduction="none")


def test_target_out_of_range() -> None:
    hidden, _ = drawn(3)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    with pytest.raises(IndexError):
        chunked_cross_entropy(head, hidden, torch.tensor([0, CLASSES, 1]))


@pytest.mark.parametrize("linear", [False, True])
def test_autocast_keeps_the_heads_gradient(linear: bool) -> None:
    hidden, target = drawn(40, dtype=torch.float32)
    head = nn.Linear(WIDTH, CLASSES)
    given = LinearHead(head.weight, head.bias) if linear else head
    with torch.autocast("cpu", torch.bfloat16):
        own = chunked_cross_entropy(given, hidden, target, [head.weight], chunk=7)
        plain = F.cross_entropy(head(hidden).float(), target)
    for a, b in zip(gradients(own, hidden, head.weight), gradients(plain, hidden, head.weight), strict=True):
        assert distance(a, b) < 1e-2


def test_adapter_on_the_head() -> None:
    model = nn.ModuleDict({"head": nn.Linear(WIDTH, CLASSES, dtype=torch.float64)})
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["head"]), seed=0)
    head = model["head"]
    trained = [p for p in head.parameters() if p.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter)
    hidden, target = drawn(30)
    own = chunked_cross_entropy(head, hidden, target, trained, chunk=8)
    plain = F.cross_entropy(head(hidden), target)
    torch.testing.assert_close(own, plain)
    for a, b in zip(gradients(own, *trained), gradients(plain, *trained), strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("trains", [False, True])
def test_peak_memory(trains: bool) -> None:
    width = 96
    weight = torch.randn(5_000, width, requires_grad=trains)
    hidden, target = torch.randn(2048, width, requires_grad=True), torch.randint(5_000, (2048,))
    plain = peak(lambda: F.cross_entropy(F.linear(hidden, weight), target).backward())
    own = peak(lambda: chunked_cross_entropy(LinearHead(weight), hidden, target).backward())
    assert own <= (0.2 if trains else 0.15) * plain


def peak(work: Callable[[], None]) -> int:
    """Bytes at the height of the work, over those before it, as torch's allocator counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    every: list[Any] = record.profiler.kineto_results.events()
    events = [e for e in every if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
