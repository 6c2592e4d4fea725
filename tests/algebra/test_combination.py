"""PEFT's methods: what each computes, element by element, and what it is told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from algebra.made import agree, made, updates, weighted
from torch import Tensor

from lorica import Adapter, algebra
from lorica.algebra.sparsify import drop_and_rescale, elected_mean, trim
from lorica.errors import AdapterError, ConfigError

WEIGHTS = [0.7, -1.3]


def pair(**settings: Any) -> list[Adapter]:
    return [made(alpha=6, seed=0, **settings), made(alpha=3, seed=1, **settings)]


def told(method: str) -> dict[str, Any]:
    return {"density": 0.5} if "density" in algebra.METHODS[method] else {}


def test_linear_is_the_product_of_two_sums_and_not_the_sum() -> None:
    one, other = pair()
    result = algebra.combine([one, other], WEIGHTS, "linear")
    for path, f in result.factors.items():
        g, h = one.factors[path], other.factors[path]
        first, second = math.sqrt(0.7 * g.scale), math.sqrt(1.3 * h.scale)
        torch.testing.assert_close(f.A, first * g.A - second * h.A)
        torch.testing.assert_close(f.B, first * g.B + second * h.B)
    agree(result, updates(result), 0)
    assert algebra.error(result, [one, other], WEIGHTS).mean > 0.5
    agree(algebra.combine([one, other], WEIGHTS, "cat"), weighted([one, other], WEIGHTS))


@pytest.mark.parametrize("weight", [0.3, -2.0])
def test_linear_of_one_is_exact(weight: float) -> None:
    one = made(use_rslora=True)
    agree(algebra.combine([one], [weight], "linear"), weighted([one], [weight]))


@pytest.mark.parametrize("rank", [None, 2, 6, 50])
def test_svd_is_the_nearest_of_its_rank(rank: int | None) -> None:
    terms = [made(4, paths=["table", "conv", "a.linear"]), made(2, seed=1, use_rslora=True)]
    result = algebra.combine(terms, WEIGHTS, "svd", svd_rank=rank)
    for path, dense in weighted(terms, WEIGHTS).items():
        groups = 2 if path == "grouped" else 1
        S = torch.linalg.svdvals(dense.flatten(1).unflatten(0, (groups, -1)))
        k = (rank or 4) // groups
        off = float((updates(result)[path] - dense).norm())
        assert off == pytest.approx(float(S[:, k:].norm()), abs=1e-5)
        assert result.factors[path].r <= (rank or 4)
    agree(result, updates(result), 0)


def test_the_rank_of_svd_is_at_most_the_layers() -> None:
    result = algebra.combine(pair(r=16), method="svd", svd_rank=16)
    assert result.factors["a.linear"].A.shape == (5, 7)
    assert result.factors["conv"].A.shape == (4, 3, 2, 2)


def by_hand(
    tensors: list[Tensor], weights: list[float], method: str, density: float, majority: str
) -> Tensor:
    """One number at a time."""
    flat = [t.flatten().tolist() for t in tensors]
    for values in flat:
        kept = sorted(range(len(values)), key=lambda i: -abs(values[i]))[: int(density * len(values))]
        values[:] = [v if i in kept else 0.0 for i, v in enumerate(values)]
    result = []
    for column in zip(*flat, strict=True):
        if method == "magnitude_prune":
            result.append(sum(w * v for w, v in zip(weights, column, strict=True)))
            continue
        votes = sum(v if majority == "total" else (v > 0) - (v < 0) for v in column)
        sign = 1 if votes >= 0 else -1
        agreeing = [w * v for w, v in zip(weights, column, strict=True) if v * sign > 0]
        result.append(sum(agreeing) / max(len(agreeing), 1))
    return torch.tensor(result, dtype=torch.float64).view(tensors[0].shape)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_pruned_by_hand(method: str, majority: Any) -> None:
    terms, weights = [made(seed=i, alpha=3 + i) for i in range(3)], [0.7, -1.3, 0.4]
    options = {"majority_sign_method": majority} if method == "ties" else {}
    on_factors = algebra.combine(terms, weights, method, density=0.6, **options)
    on_products = algebra.combine(terms, weights, f"{method}_svd", density=0.6, svd_rank=50, **options)
    for path in terms[0].factors:
        f = [term.factors[path] for term in terms]
        shares = [w * each.scale for w, each in zip(weights, f, strict=True)]
        roots = [math.sqrt(abs(s)) for s in shares]
        signed = [math.copysign(root, s) for root, s in zip(roots, shares, strict=True)]
        A = by_hand([each.A for each in f], signed, method, 0.6, majority)
        B = by_hand([each.B for each in f], roots, method, 0.6, majority)
        torch.testing.assert_close(on_factors.factors[path].A.double(), A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(on_factors.factors[path].B.double(), B, rtol=1e-5, atol=1e-6)
        products = [updates(term)[path] for term in terms]
        expected = by_hand(products, weights, method, 0.6, majority)
        torch.testing.assert_close(updates(on_products)[path], expected, rtol=1e-4, atol=1e-4)


class TestDare:
    def test_elements_are_dropped_or_divided_by_what_is_kept(self) -> None:
        one = made(alpha=4, r=4)
        dropped = algebra.combine([one], method="dare_linear", density=0.25, seed=3)
        shares = []
        for path, f in dropped.factors.items():
            for found, whole in ((f.A, one.factors[path].A), (f.B, one.factors[path].B)):
                kept = found != 0
                torch.testing.assert_close(found[kept], whole[kept] / 0.25)
                shares.append(kept.flatten())
        assert float(torch.cat(shares).double().mean()) == pytest.approx(0.25, abs=0.12)

    def test_the_expectation_stays(self) -> None:
        tensor = torch.randn(50)
        draw = torch.Generator().manual_seed(0)
        mean = torch.stack([drop_and_rescale(tensor, 0.5, draw) for _ in range(4000)]).mean(0)
        torch.testing.assert_close(mean, tensor, atol=6 * float(tensor.abs().max()) / math.sqrt(4000), rtol=0)

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
    def test_a_seed_fixes_it_whatever_else_is_adapted(self, method: str) -> None:
        fewer = [made(seed=i, paths=["a.linear"]) for i in range(2)]
        results = [
            algebra.combine(terms, method=method, density=0.5, seed=seed)
            for terms, seed in (([*fewer], 1), ([*fewer], 1), ([fewer[0], made(seed=1)], 1), (fewer, 2))
        ]
        first, again, _, otherwise = (updates(result)["a.linear"] for result in results)
        assert torch.equal(first, again)
        assert not torch.allclose(first, otherwise)
        other = [fewer[0], Adapter(fewer[1].config, {**made(seed=5).factors, **fewer[1].factors})]
        among = algebra.combine(other, method=method, density=0.5, seed=1)
        assert torch.equal(updates(among)["a.linear"], first)

    def test_without_a_seed_torchs_own_decides(self) -> None:
        def once() -> Tensor:
            return algebra.combine(pair(), method="dare_linear", density=0.5).factors["table"].A

        torch.manual_seed(1)
        first = once()
        assert not torch.equal(first, once())
        torch.manual_seed(1)
        assert torch.equal(first, once())

    def test_torchs_default_device_has_no_say(self) -> None:
        terms = pair()
        first = algebra.combine(terms, method="dare_linear", density=0.5, seed=1)
        with torch.device("meta"):
            again = algebra.combine(terms, method="dare_linear", density=0.5, seed=1)
        assert torch.equal(first.factors["table"].A, again.factors["table"].A)


class TestElements:
    def test_trim(self) -> None:
        found = trim(torch.tensor([[3.0, -1.0], [0.5, -4.0]]), 0.5)
        assert found.tolist() == [[3.0, 0.0], [0.0, -4.0]]

    def test_the_majority(self) -> None:
        stack = torch.tensor([[4.0, 1.0], [-1.0, 1.0], [-1.0, -2.0]])
        assert elected_mean(stack, [1, 1, 1], "total").tolist() == [4.0, 1.0]
        assert elected_mean(stack, [1, 1, 1], "frequency").tolist() == [-1.0, 1.0]
        assert elected_mean(stack, [2, 3, 1], "frequency").tolist() == [-2.0, 2.5]


def test_clamping_brings_the_largest_elements_down() -> None:
    plain = algebra.combine(pair(), method="svd", svd_rank=4)
    clamped = algebra.combine(pair(), method="svd", svd_rank=4, svd_clamp=0.9)
    for path, f in clamped.factors.items():
        bound = max(float(f.A.abs().max()), float(f.B.abs().max()))
        g = plain.factors[path]
        assert bound < max(float(g.A.abs().max()), float(g.B.abs().max()))
        share = torch.cat([f.A.flatten(), f.B.flatten()]).abs().ge(bound).double().mean()
        assert 0.05 < float(share) < 0.35
    whole = algebra.combine(pair(), method="svd", svd_rank=4, svd_clamp=1.0)
    assert algebra.error(whole, [plain]).mean < 0.5


@pytest.mark.parametrize("method", algebra.METHODS)
def test_every_method_makes_an_adapter_whose_settings_are_true(method: str) -> None:
    terms = [*pair(), made(seed=2, paths=["table"])]
    result = algebra.combine(terms, [1, 0.5, 2], method, **told(method))
    agree(result, updates(result), 0)
    result.check_finite()
    assert result.lora.lora_alpha == result.lora.r


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_methods_on_factors_need_one_rank(method: str) -> None:
    with pytest.raises(AdapterError, match=r"one rank .*\n  a\.linear: 2 and 4\n(.*\n)*Use cat"):
        algebra.combine([made(4), made(2)], method=method, **told(method))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tie", {}, "no method 'tie'; did you mean 'ties'"),
        ("cat", {"density": 0.5}, "cat takes no density; it takes no options"),
        ("linear", {"svd_rank": 3}, "linear takes no svd_rank"),
        ("svd", {"seed": 3}, "svd takes no seed; it takes svd_rank, svd_clamp, svd_driver"),
        ("ties", {}, r"ties needs density, the share of elements to keep, in \(0, 1\], not None"),
        ("ties", {"density": 0.0}, "in .0, 1., not 0.0"),
        ("dare_ties", {"density": 1.5}, "in .0, 1., not 1.5"),
        ("ties", {"density": 0.5, "majority_sign_method": "all"}, "one of .'total', 'frequency'., not 'all'"),
        ("svd", {"svd_rank": 0}, "svd_rank must be at least 1, not 0"),
        ("svd", {"svd_rank": 1}, "grouped is a convolution in 2 groups"),
        ("svd", {"svd_clamp": 0}, r"svd_clamp must be a quantile in \(0, 1\], not 0"),
        ("svd", {"svd_driver": "gesvd"}, "the adapters are not on a GPU"),
    ],
)
def test_what_cannot_be_asked(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        algebra.combine(pair(), method=method, **options)
