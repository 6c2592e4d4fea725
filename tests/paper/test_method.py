"""What the paper says of the method as a whole: its scale, its full rank, tasks that need much of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from tiny import adapted, transformer
from torch import Tensor, nn

import lorica
from lorica import study


def layer(r: int, alpha: float, *, d_out: int = 6, d_in: int = 9) -> nn.Sequential:
    """One adapted layer in float64, the same weight and start each time for the same shape."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=False, dtype=torch.float64))
    lorica.adapt(model, lorica.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"]), seed=0)
    return model


def update(model: nn.Module) -> Tensor:
    return oracle.update(lorica.extract(model).factors["0"])


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class TestScale:
    """α stays what it was first set to, whatever the rank (§4.1)."""

    def course(self, scale: float, rate: float, stretch: float, steps: int = 200) -> Tensor:
        """ΔW after each of Adam's steps: (steps, d_out, d_in)."""
        model = layer(3, 3 * scale)
        draw = torch.Generator().manual_seed(1)
        x, y = (torch.randn(40, d, generator=draw, dtype=torch.float64) for d in (9, 6))
        parameters = trained(model)
        with torch.no_grad():
            parameters[0].mul_(stretch)  # A; B starts at zero
        # An eps would set a size that gradients are measured by.
        adam = torch.optim.Adam(parameters, lr=rate, eps=1e-200)
        seen = []
        for _ in range(steps):
            adam.zero_grad()
            (model(x) - y).square().mean().backward()
            adam.step()
            seen.append(update(model))
        return torch.stack(seen)

    def test_alpha_is_a_learning_rate_under_adam_if_the_start_is_scaled(self) -> None:
        """Exactly: scale s at rate η from A₀ is scale 1 at rate √s·η from √s·A₀."""
        s, rate = 8.0, 1e-2
        expected = self.course(s, rate, 1.0)
        assert float(expected[-1].norm()) > 1
        found = self.course(1.0, math.sqrt(s) * rate, math.sqrt(s))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        without = self.course(1.0, s * rate, 1.0)
        assert float((without - expected).abs().max()) > 0.05

    def test_the_first_steps_do_not_depend_on_the_rank(self) -> None:
        """With α fixed: the mean loss of several starts falls alike at rank 1 and at rank 64."""
        courses = {r: self.losses(r, 5e-4, 5) for r in (1, 4, 16, 64)}
        fallen = {r: float(course[0] - course[-1]) for r, course in courses.items()}
        assert fallen[64] > 0.003
        for found in fallen.values():
            assert found == pytest.approx(fallen[64], rel=0.1)

    def test_the_best_learning_rate_is_the_same_at_every_rank(self) -> None:
        """Within a step of the grid, with α fixed."""
        grid = [2e-4 * 4**i for i in range(6)]
        best = []
        for r in (1, 4, 16, 64):
            finals = [float(self.losses(r, rate, 30, starts=3)[-1]) for rate in grid]
            best.append(min(range(len(grid)), key=finals.__getitem__))
        assert min(best) > 0
        assert max(best) < len(grid) - 1
        assert max(best) - min(best) <= 1

    def losses(self, r: int, rate: float, steps: int, starts: int = 8) -> Tensor:
        """The loss at each step, the mean over several starts."""
        draw = torch.Generator().manual_seed(2)
        x = torch.randn(256, 64, generator=draw)
        y = x @ torch.randn(64, 64, generator=draw) / 8
        seen = []
        for seed in range(starts):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 64, bias=False))
            config = lorica.LoraConfig(r=r, lora_alpha=16, target_modules=["0"])
            lorica.adapt(model, config, seed=seed)
            adam = torch.optim.Adam(trained(model), lr=rate)
            for _ in range(steps):
                loss = (model(x) - y).square().mean()
                seen.append(loss.detach())
                adam.zero_grad()
                loss.backward()
                adam.step()
        return torch.stack(seen).view(starts, steps).mean(0)


class TestRank:
    """What a rank can express, and which tasks ask for much of it (§4.1, §7.2)."""

    def fitted(self, target: Tensor, r: int) -> nn.Sequential:
        """A layer whose update was trained towards `target`."""
        d_out, d_in = target.shape
        model = layer(r, r, d_out=d_out, d_in=d_in)
        weight = target + model.get_parameter("0.weight").detach()
        optimizer = torch.optim.LBFGS(
            trained(model), max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, history_size=40,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (model(torch.eye(d_in, dtype=torch.float64)) - weight.T).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return model

    @pytest.mark.parametrize(("d_out", "d_in"), [(4, 7), (7, 4), (5, 5)])
    def test_full_rank_reaches_any_update_and_one_less_does_not(self, d_out: int, d_in: int) -> None:
        target = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        full = min(d_out, d_in)
        assert float((update(self.fitted(target, full)) - target).abs().max()) < 1e-6
        missed = float((update(self.fitted(target, full - 1)) - target).norm())
        # No matrix of that rank is nearer than the smallest singular value (Eckart and Young).
        assert missed == pytest.approx(float(torch.linalg.svdvals(target)[-1]), rel=1e-3)

    def test_a_task_that_changes_every_direction_needs_every_rank(self) -> None:
        """As another language might: each rank that is missing costs its share, and the advice says so."""
        d = 16
        draw = torch.Generator().manual_seed(4)
        target = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64)).Q
        for r in (1, 4, 8, 16):
            model = self.fitted(target, r)
            missed = float((update(model) - target).square().sum() / target.square().sum())
            assert missed == pytest.approx(1 - r / d, abs=1e-6)
            found = study.spectrum(lorica.extract(model)).layers["0"]
            assert found.effective_rank == pytest.approx(r, rel=1e-3)
        advice = study.advise(lorica.extract(self.fitted(target, 4)))
        assert advice.layers["0"].needed == 4
        assert any("use every rank they have" in line for line in advice.evidence)

    def test_a_task_that_changes_one_direction_needs_one(self) -> None:
        draw = torch.Generator().manual_seed(5)
        target = torch.randn(9, 1, generator=draw, dtype=torch.float64) @ torch.randn(
            1, 12, generator=draw, dtype=torch.float64
        )
        model = self.fitted(target, 4)
        assert float((update(model) - target).abs().max()) < 1e-6
        assert study.advise(lorica.extract(model)).layers["0"].needed == 1


def test_attention_is_the_papers_formula_over_the_sums() -> None:
    """softmax(Q·Kᵀ/√d)·V, head by head, with W0 + (α/r)·B·A for the weights of Q, K and V."""
    model = transformer("bert", num_attention_heads=2)
    adapted(model, lorica.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "key", "value"]))
    attention = model.encoder.layer[0].attention.self
    x = torch.randn(2, 5, 16)
    projected: Callable[[nn.Module], Tensor] = lambda m: (  # noqa: E731
        x @ (m.get_parameter("weight") + oracle.delta(m, "default")).T + m.get_parameter("bias")  # pyright: ignore[reportArgumentType]
    )
    q, k, v = (projected(m).unflatten(-1, (2, 8)) for m in (attention.query, attention.key, attention.value))
    heads = []
    for h in range(2):
        scores = q[:, :, h] @ k[:, :, h].mT / math.sqrt(8)
        heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v[:, :, h])
    torch.testing.assert_close(attention(x)[0], torch.cat(heads, -1), rtol=1e-5, atol=1e-6)
