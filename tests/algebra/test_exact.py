"""Sums, differences and multiples, against dense matrices."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from algebra.made import agree, made, updates, weighted
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import bits

import lorica
from lorica import LoraConfig, algebra
from lorica.errors import AdapterError, ConfigError


class TestConcatenate:
    @given(
        ranks=st.lists(st.sampled_from([2, 4, 6]), min_size=1, max_size=3),
        weights=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
        rooted=st.lists(st.booleans(), min_size=3, max_size=3),
    )
    @settings(max_examples=40)
    def test_the_weighted_sum(self, ranks: list[int], weights: list[float], rooted: list[bool]) -> None:
        adapters = [made(r, 3 + i, seed=i, use_rslora=rooted[i]) for i, r in enumerate(ranks)]
        weights = weights[: len(ranks)]
        result = algebra.concatenate(adapters, weights)
        agree(result, weighted(adapters, weights))
        assert {f.r for f in result.factors.values()} == {sum(ranks)}
        assert not result.lora.use_rslora

    def test_a_layer_that_one_lacks_counts_as_zero(self) -> None:
        one, other = made(paths=["table", "conv"]), made(r=2, seed=1, paths=["conv", "a.linear"])
        result = algebra.concatenate([one, other], [2.0, -0.5])
        agree(result, weighted([one, other], [2.0, -0.5]))
        assert {path: f.r for path, f in result.factors.items()} == {"table": 4, "conv": 6, "a.linear": 2}

    def test_patterns_of_the_terms_are_resolved(self) -> None:
        one = made(rank_pattern={"linear": 2}, alpha_pattern={"conv": 9, r"a\.linear": 0.5})
        other = made(seed=1, rank_pattern={"table": 6}, use_rslora=True)
        result = algebra.add(one, other)
        agree(result, weighted([one, other], [1, 1]))

    def test_settings_tell_a_path_from_one_that_ends_like_it(self) -> None:
        factors = {"linear": made(r=2).factors["a.linear"], **made(r=4).factors}
        one = lorica.Adapter(LoraConfig(r=4, target_modules=["linear"]), factors)
        config = algebra.concatenate([one]).lora
        assert (config.rank("linear"), config.rank("a.linear"), config.rank("b.linear")) == (2, 4, 4)

    def test_read_back_from_its_file_it_is_the_same(self, tmp_path: Path) -> None:
        one, other = made(use_rslora=True), made(r=6, seed=1, paths=["conv", "grouped"])
        result = algebra.concatenate([one, other], [0.3, 2.0])
        lorica.write(result, tmp_path)
        again = lorica.read(tmp_path)
        agree(again, updates(result), 0)
        assert again.config.inference_mode

    def test_factors_of_a_sum_are_those_of_the_terms(self) -> None:
        one, other = made(alpha=4, r=4), made(alpha=4, r=4, seed=1)
        f = algebra.subtract(one, other).factors["table"]
        g, h = one.factors["table"], other.factors["table"]
        assert bits(f.A) == bits(torch.cat([g.A, h.A]))
        assert bits(f.B) == bits(torch.cat([g.B, -h.B], 1))

    def test_half_precision_is_not_rounded_again(self) -> None:
        one, other = made(dtype=torch.bfloat16), made(seed=1, dtype=torch.float16)
        result = algebra.concatenate([one, other], [0.3, 0.7])
        agree(result, weighted([one, other], [0.3, 0.7]))
        assert {t.dtype for t in result.named_tensors().values()} == {torch.float32}

    def test_the_terms_are_left_alone(self) -> None:
        one, other = made(), made(seed=1)
        before = [bits(t) for t in one.named_tensors().values()]
        result = algebra.add(one, other)
        for factors in result.factors.values():
            factors.A.zero_()
            factors.B.zero_()
        assert [bits(t) for t in one.named_tensors().values()] == before

    @pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [math.inf, 1.0]])
    def test_weights_that_are_none(self, weights: list[float]) -> None:
        with pytest.raises(ConfigError, match="expected 2 finite weights"):
            algebra.concatenate([made(), made()], weights)

    def test_no_adapter(self) -> None:
        with pytest.raises(ConfigError, match="at least one"):
            algebra.add()


class TestAddAndSubtract:
    def test_they_are_sums(self) -> None:
        one, two, three = made(), made(2, 5, 1), made(6, 1, 2)
        agree(algebra.add(one, two, three), weighted([one, two, three], [1, 1, 1]))
        agree(algebra.subtract(one, two), weighted([one, two], [1, -1]))

    def test_an_adapter_less_itself_is_nothing(self) -> None:
        one = made()
        nothing = algebra.subtract(one, one)
        assert algebra.error(nothing, [one]).worst[1] == pytest.approx(1)
        agree(nothing, weighted([one], [0]))


class TestScale:
    @given(st.floats(-5, 5))
    def test_a_multiple(self, factor: float) -> None:
        one = made(use_rslora=True, rank_pattern={"table": 2}, alpha_pattern={"conv": 3})
        scaled = algebra.scale(one, factor)
        for path, expected in weighted([one], [factor]).items():
            torch.testing.assert_close(updates(scaled)[path], expected)
            assert scaled.lora.scale(path) == pytest.approx(scaled.factors[path].scale)

    def test_no_tensor_changes_but_for_a_sign(self) -> None:
        one = made(extras={"head": torch.ones(2)})
        up, down = algebra.scale(one, 0.1), algebra.scale(one, -0.1)
        assert all(up.factors[path].A is f.A and up.factors[path].B is f.B for path, f in one.factors.items())
        assert all(torch.equal(down.factors[path].B, -f.B) for path, f in one.factors.items())
        assert up.extras is one.extras

    def test_by_nothing(self) -> None:
        assert algebra.error(algebra.scale(made(), 0), [made()], [0.0]).worst[1] == 0

    @pytest.mark.parametrize("factor", [math.nan, math.inf])
    def test_by_what_is_no_number(self, factor: float) -> None:
        with pytest.raises(ConfigError, match="finite"):
            algebra.scale(made(), factor)


@pytest.mark.parametrize(
    "operate",
    [
        lambda dora: algebra.add(dora, made()),
        lambda dora: algebra.scale(dora, 2),
        lambda dora: algebra.combine([made(), dora], method="linear"),
    ],
)
def test_magnitudes_do_not_add_up(operate: object) -> None:
    with pytest.raises(AdapterError, match=r"DoRA .* a\.linear, b\.linear, table, \.\.\. \(2 more\)"):
        operate(made(use_dora=True))  # type: ignore[operator]
