"""Whether adapters go together, and what a result keeps of what is no update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from algebra.made import made, updates
from tiny import Toy, adapted, outputs, shake
from torch import Tensor, nn

import lorica
from lorica import Adapter, LoraConfig, algebra
from lorica.errors import AdapterError, ConfigError, LoricaWarning

HEAD = {"head.weight": torch.ones(3, 2)}


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def trained(seed: int = 0, **settings: Any) -> Adapter:
    return trained_by(LoraConfig(r=2, **settings), seed)


def trained_by(config: LoraConfig, seed: int) -> Adapter:
    return lorica.extract(adapted(toy(), config, seed=seed))


class TestTargets:
    def test_the_same_stay(self) -> None:
        assert (
            algebra.add(
                made(target_modules="linear|conv"), made(target_modules="linear|conv")
            ).lora.target_modules
            == "linear|conv"
        )

    def test_names_unite(self) -> None:
        one, other = made(paths=["table"]), made(paths=["a.linear", "table"])
        assert algebra.add(one, other).lora.target_modules == ["table", "a.linear"]

    @pytest.mark.parametrize(
        "selected",
        [
            {"target_modules": ".*up"},
            {"target_modules": ["up"], "layers_to_transform": [1]},
            {"target_modules": "all-linear"},
        ],
    )
    def test_of_other_kinds_they_are_named_one_by_one(self, selected: dict[str, Any]) -> None:
        one, other = trained(target_modules=["down"], layers_to_transform=[0]), trained(1, **selected)
        result = algebra.add(one, other)
        assert set(result.lora.target_modules or ()) == one.factors.keys() | other.factors.keys()
        assert result.lora.layers_to_transform is None
        both = lorica.attach(lorica.attach(toy(), one, "one"), other, "other")
        lorica.active(both, ["one", "other"])
        torch.testing.assert_close(outputs(lorica.attach(toy(), result)), outputs(both))

    def test_an_attention_is_named_without_its_output(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention, self.up = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)

        def of(names: Any) -> Adapter:
            return lorica.extract(lorica.adapt(Attention(), LoraConfig(target_modules=names)))

        result = algebra.add(of(["attention"]), of("up"))
        assert list(result.factors) == ["attention", "attention.out_proj", "up"]
        assert result.lora.target_modules == ["attention", "up"]


class TestTrainedWhole:
    def test_what_is_the_same_or_in_one_alone_stays(self) -> None:
        one = made(extras=HEAD, modules_to_save=["head"], task_type="SEQ_CLS")
        other = made(seed=1, extras={name: t.clone() for name, t in HEAD.items()}, modules_to_save=["head"])
        third = made(seed=2, extras={"norm.bias": torch.ones(2)}, modules_to_save=["norm"])
        result = algebra.add(one, other, third)
        assert {name: tuple(t.shape) for name, t in result.extras.items()} == {
            "head.weight": (3, 2),
            "norm.bias": (2,),
        }
        assert result.config.modules_to_save == ["head", "norm"]
        assert result.config.task_type == "SEQ_CLS"

    @pytest.mark.parametrize("tensor", [torch.zeros(3, 2), torch.ones(2, 2), torch.ones(3, 2).half()])
    def test_what_differs_must_be_chosen(self, tensor: Tensor) -> None:
        one, other = made(extras=HEAD), made(seed=1, extras={"head.weight": tensor, "own": tensor})
        with pytest.raises(AdapterError, match=r"differ:\n  head\.weight: other values in each\n.*keep=0"):
            algebra.add(one, other)
        assert algebra.add(one, other, keep=0).extras == HEAD
        assert algebra.add(one, other, keep=1).extras == other.extras

    @pytest.mark.parametrize("keep", [-1, 2])
    def test_a_choice_of_none(self, keep: int) -> None:
        with pytest.raises(ConfigError, match=f"index of an adapter, 0 to 1, not {keep}"):
            algebra.add(made(), made(), keep=keep)

    def test_tasks_and_biases_differ(self) -> None:
        one, other = made(task_type="SEQ_CLS", bias="all"), made(task_type="CAUSAL_LM", bias="lora_only")
        with pytest.raises(
            AdapterError, match=r"task_type: 'SEQ_CLS' and 'CAUSAL_LM'\n  bias: 'all' and 'lora_only'"
        ):
            algebra.add(one, other)
        config = algebra.add(one, other, keep=1).lora
        assert (config.task_type, config.bias) == ("CAUSAL_LM", "lora_only")

    def test_whole_in_one_and_updated_in_the_other(self) -> None:
        one, other = made(paths=["table"], modules_to_save=["conv"]), made(paths=["conv"])
        with pytest.raises(AdapterError, match="conv: trained whole in one adapter and updated in another"):
            algebra.add(one, other)

    @pytest.mark.parametrize("bias", ["lora_only", "all"])
    @pytest.mark.parametrize("targets", [["up"], ["down", "embed"]])
    def test_trained_biases_act_in_the_result(self, bias: str, targets: list[str]) -> None:
        one = trained(target_modules=["up"], bias=bias)
        other = lorica.extract(adapted(toy(), LoraConfig(r=2, target_modules=targets), seed=1))
        both = lorica.attach(lorica.attach(toy(), one, "one"), other, "other")
        lorica.active(both, ["one", "other"])
        result = algebra.add(one, other)
        torch.testing.assert_close(outputs(lorica.attach(toy(), result)), outputs(both))


class TestSettings:
    def test_what_only_training_sees_falls_back_where_it_differs(self) -> None:
        one = made(lora_dropout=0.1, init_lora_weights="gaussian", revision="a", fan_in_fan_out=True)
        same = algebra.add(one, made(lora_dropout=0.1, init_lora_weights="gaussian", revision="a")).lora
        assert (same.lora_dropout, same.init_lora_weights, same.revision) == (0.1, "gaussian", "a")
        assert same.fan_in_fan_out
        other = algebra.add(one, made(lora_dropout=0.2)).lora
        assert (other.lora_dropout, other.init_lora_weights, other.revision) == (0.0, True, None)

    def test_other_bases_are_warned_of(self) -> None:
        one, other = made(base_model_name_or_path="org/one"), made(base_model_name_or_path="org/other")
        with pytest.warns(LoricaWarning, match="different bases: 'org/one', 'org/other'"):
            assert algebra.add(one, made(), other).config.base_model_name_or_path == "org/one"
        assert algebra.add(made(), one).config.base_model_name_or_path == "org/one"

    def test_a_setting_that_cannot_be_settled(self) -> None:
        with pytest.raises(AdapterError, match="differ in lora_bias, and no one"):
            algebra.add(made(), made(lora_bias=True))

    def test_the_commonest_rank_is_r(self) -> None:
        one = made(2, paths=["a.linear", "b.linear", "table"])
        config = algebra.add(one, made(4, paths=["table"])).lora
        assert (config.r, config.lora_alpha) == (2, 2)
        assert config.rank_pattern == config.alpha_pattern == {"^table": 6}

    def test_kinds_and_shapes_are_all_listed(self) -> None:
        one, other = made(), made(seed=1)
        factors = {
            **other.factors,
            "table": other.factors["conv"],
            "conv": other.factors["grouped"],
            "b.linear": other.factors["table"],
        }
        with pytest.raises(AdapterError) as caught:
            algebra.add(one, Adapter(other.config, factors))
        assert str(caught.value).splitlines()[1:] == [
            "  b.linear: linear 7 → 5 and embedding 11 → 6",
            "  table: embedding 11 → 6 and conv 3 × 2 × 2 → 4",
            "  conv: conv 3 × 2 × 2 → 4 and conv 4 × 3 → 6 in 2 groups",
        ]


def test_a_sum_acts_as_its_terms_together() -> None:
    config = LoraConfig(r=2, target_modules=["up", "embed"], modules_to_save=["head"])
    one = lorica.extract(adapted(toy(), config, seed=0))
    other = lorica.extract(adapted(toy(), config.replace(use_rslora=True, modules_to_save=None), seed=1))
    both = lorica.attach(lorica.attach(toy(), one, "one"), other, "other")
    lorica.active(both, ["one", "other"])
    result = lorica.attach(toy(), algebra.add(one, other), trainable=True)
    torch.testing.assert_close(outputs(result), outputs(both))
    shake(result)  # it trains on
    assert not torch.allclose(outputs(result), outputs(both))
    assert updates(lorica.extract(result)).keys() == one.factors.keys()


class TestBiasesOnB:
    """``scale·(B·A·x + b)``: linear in b, as it is in B."""

    CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"], lora_bias=True)

    def both(self, *signs: float) -> tuple[list[Adapter], Tensor]:
        """Two adapters, and what a model computes with both of them scaled so."""
        terms = [
            trained_by(config, seed) for seed, config in enumerate((self.CONFIG, self.CONFIG.replace(r=2)))
        ]
        model = toy()
        for i, (term, sign) in enumerate(zip(terms, signs, strict=True)):
            lorica.attach(model, algebra.scale(term, sign), f"a{i}")
        lorica.active(model, ["a0", "a1"])
        return terms, outputs(model)

    def test_a_multiple_moves_the_output_as_far(self) -> None:
        one = trained_by(self.CONFIG.replace(target_modules=["head"]), 0)
        base, at_one = outputs(toy()), outputs(lorica.attach(toy(), one))
        for factor in (0.3, -2.0, 0.0):
            moved = outputs(lorica.attach(toy(), algebra.scale(one, factor)))
            torch.testing.assert_close(moved - base, factor * (at_one - base), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)])
    def test_a_sum(self, weights: tuple[float, float]) -> None:
        terms, expected = self.both(*weights)
        for method in ("cat", "svd"):
            result = algebra.combine(terms, weights, method, svd_rank=20 if method == "svd" else None)
            torch.testing.assert_close(outputs(lorica.attach(toy(), result)), expected)

    def test_every_method_adds_them_up(self) -> None:
        terms = [trained_by(self.CONFIG, seed) for seed in range(2)]
        sums = {f: [term.factors[f] for term in terms] for f in terms[0].factors}
        for method, options in algebra.METHODS.items():
            density = 0.5 if "density" in options else None
            result = algebra.combine(terms, [1, -1], method, density=density)
            for path, (f, g) in sums.items():
                assert f.bias is not None
                assert g.bias is not None
                torch.testing.assert_close(result.factors[path].bias, f.scale * f.bias - g.scale * g.bias)

    def test_compressed(self) -> None:
        one = trained_by(self.CONFIG, 0)
        result, _ = algebra.compress(one, energy=1)
        torch.testing.assert_close(outputs(lorica.attach(toy(), result)), outputs(lorica.attach(toy(), one)))
