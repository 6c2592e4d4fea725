"""Less rank: the nearest update of it, and an error that is the true one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from algebra.made import agree, made, updates
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Toy, adapted, outputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lorica
from lorica import Adapter, Factors, LoraConfig, algebra
from lorica.errors import ConfigError


def values(update: Tensor, groups: int) -> Tensor:
    """Singular values of each group of an update, from the dense matrix: (groups, k)."""
    return torch.linalg.svdvals(update.flatten(1).unflatten(0, (groups, -1)))


@given(r=st.sampled_from([2, 4, 8, 16]), rank=st.integers(2, 20), seed=st.integers(0, 3))
@settings(max_examples=40)
def test_no_other_of_that_rank_is_nearer(r: int, rank: int, seed: int) -> None:
    one = made(r, seed=seed)
    result, report = algebra.compress(one, rank=rank)
    for path, dense in updates(one).items():
        groups = one.factors[path].groups
        spectrum = values(dense, groups)
        k = min(rank // groups, spectrum.shape[1], r // groups)
        assert result.factors[path].r == k * groups
        best = float(spectrum[:, k:].norm() / dense.norm())
        assert report.layers[path].error == pytest.approx(best, abs=1e-6)
        found = updates(result)[path]
        assert float((found - dense).norm() / dense.norm()) == pytest.approx(best, abs=1e-6)
        assert report.layers[path].norm == pytest.approx(float(dense.norm()))
    agree(result, updates(result), 0)


@given(energy=st.floats(0.05, 1), seed=st.integers(0, 3))
@settings(max_examples=40)
def test_the_smallest_rank_that_keeps_the_energy(energy: float, seed: int) -> None:
    one = made(6, seed=seed)
    result, report = algebra.compress(one, energy=energy)
    for path, dense in updates(one).items():
        groups = one.factors[path].groups
        energies = values(dense, groups).square().sum(0)
        shares = [float(energies[:k].sum() / energies.sum()) for k in range(len(energies) + 1)]
        k = next(k for k, share in enumerate(shares) if share >= energy - 1e-12)
        assert result.factors[path].r == max(k, 1) * groups
        assert report.layers[path].error ** 2 == pytest.approx(1 - shares[max(k, 1)], abs=1e-6)


def test_a_rank_caps_what_an_energy_asks() -> None:
    one = made(6)
    by_energy, _ = algebra.compress(one, energy=0.9)
    both, _ = algebra.compress(one, rank=2, energy=0.9)
    assert {f.r for f in by_energy.factors.values()} >= {4}
    assert {f.r for f in both.factors.values()} == {2}


def test_what_is_there_twice_takes_no_more_rank() -> None:
    one = made(2)
    result, report = algebra.compress(algebra.add(one, one, made(2, seed=1)), energy=1)
    assert {f.r for f in result.factors.values()} == {4}
    assert report.worst[1] < 1e-7
    agree(result, updates(algebra.add(one, one, made(2, seed=1))))


def test_a_rank_that_no_matrix_of_the_layer_can_have() -> None:
    one = made(16)
    result, report = algebra.compress(one, energy=1)
    assert {path: f.r for path, f in result.factors.items()} == {
        "a.linear": 5,
        "b.linear": 5,
        "table": 6,
        "conv": 4,
        "grouped": 6,
    }
    assert report.worst[1] < 1e-6


def test_an_update_that_never_left_zero() -> None:
    factors = {"a": Factors(torch.randn(4, 7), torch.zeros(5, 4), 2.0), **made().factors}
    result, report = algebra.compress(Adapter(LoraConfig(r=4), factors), energy=0.5)
    assert result.factors["a"].r == 1
    assert report.layers["a"].error == 0
    assert updates(result)["a"].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay_and_the_error_has_their_rounding(dtype: torch.dtype) -> None:
    one = made(dtype=dtype)
    result, report = algebra.compress(one, energy=1)
    assert {t.dtype for t in result.named_tensors().values()} == {dtype}
    for path, dense in updates(one).items():
        true = float((updates(result)[path] - dense).norm() / dense.norm())
        assert report.layers[path].error == pytest.approx(true, rel=1e-3, abs=1e-14)
    assert (report.worst[1] > 1e-4) == (dtype != torch.float64)


def test_head_biases_and_settings_stay() -> None:
    one = made(extras={"head.weight": torch.ones(2)}, use_rslora=True, task_type="SEQ_CLS", lora_dropout=0.1)
    result, _ = algebra.compress(one, rank=2)
    assert result.extras is one.extras
    changed = {"r": 2, "lora_alpha": 2, "use_rslora": False}
    assert result.config == one.config.replace(**changed)


def test_dora_keeps_its_magnitudes_and_so_the_norms_of_the_rows() -> None:
    config = LoraConfig(r=4, target_modules=["up", "embed"], use_dora=True)
    torch.manual_seed(0)
    model = adapted(Toy(), config)
    one, before = lorica.extract(model), outputs(model)
    exact, _ = algebra.compress(one, energy=1)
    torch.manual_seed(0)
    torch.testing.assert_close(outputs(lorica.attach(Toy(), exact)), before)
    cut, report = algebra.compress(one, rank=2)
    assert report.worst[1] > 0.1
    for path, f in cut.factors.items():
        assert f.magnitude is one.factors[path].magnitude
    torch.manual_seed(0)
    merged = lorica.attach(base := Toy(), cut)
    lorica.merge(merged)
    for path in ("blocks.0.up", "blocks.1.up"):
        norms = base.get_parameter(f"{path}.weight").norm(dim=1)
        torch.testing.assert_close(norms, cut.factors[path].magnitude)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(output, Tensor):
                self.elements = max(self.elements, output.numel())
        return result


def test_the_product_is_never_formed() -> None:
    wide = Adapter(LoraConfig(r=4), {"a": Factors(torch.randn(4, 300), torch.randn(400, 4), 1.0)})
    with Largest() as seen:
        algebra.compress(wide, rank=2)
        algebra.combine([wide, wide], method="svd")
    assert 400 * 4 <= seen.elements <= 400 * 16
    with Largest() as seen:
        algebra.combine([wide, wide], method="ties_svd", density=0.5)
    assert seen.elements >= 400 * 300


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "give rank or energy"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"energy": 0.0}, r"energy must be a share in \(0, 1\], not 0"),
        ({"energy": 1.5}, "energy must be a share"),
        ({"energy": float("nan")}, "energy must be a share"),
        ({"rank": 1}, "grouped is a convolution in 2 groups; its rank must be at least that, not 1"),
    ],
)
def test_what_cannot_be_asked(asked: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        algebra.compress(made(), **asked)  # type: ignore[arg-type]


def test_the_report_reads_worst_first() -> None:
    one = made(paths=["a.linear", "conv"])
    _, report = algebra.compress(one, rank=2)
    head, first, second = str(report).splitlines()
    worst, share = report.worst
    assert head.startswith("relative error of the update in 2 layers: worst")
    assert first.endswith(worst)
    assert f"{share:.2e}" in first
    assert not second.endswith(worst)
    squares = {path: dense.square().sum() for path, dense in updates(one).items()}
    lost = sum(report.layers[path].error ** 2 * float(size) for path, size in squares.items())
    assert report.energy == pytest.approx(1 - lost / float(sum(squares.values())))
    assert report.mean == pytest.approx(sum(e.error for e in report.layers.values()) / 2)


class TestError:
    def test_of_other_layers(self) -> None:
        one, other = made(paths=["table"]), made(paths=["conv"])
        report = algebra.error(one, [other])
        assert report.layers["conv"].error == pytest.approx(1)
        assert report.layers["table"].error == float("inf")
        assert report.layers["conv"].rank == 0

    def test_of_two_that_cancel(self) -> None:
        one = made()
        nothing = algebra.error(dataclasses.replace(one, factors={}), [one, one], [1, -1])
        assert nothing.worst[1] == 0
        assert nothing.energy == 1
        assert algebra.error(one, [one, one], [1, -1]).energy == float("-inf")

    def test_finer_than_the_root_of_rounding(self) -> None:
        one = made(dtype=torch.float64)
        moved = dict(one.factors)
        f = moved["a.linear"]
        moved["a.linear"] = dataclasses.replace(f, B=f.B * (1 + 1e-12))
        assert algebra.error(dataclasses.replace(one, factors=moved), [one]).layers[
            "a.linear"
        ].error == pytest.approx(1e-12, rel=1e-2)
