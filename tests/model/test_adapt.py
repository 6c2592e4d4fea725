"""Putting adapters on, taking them off, and choosing which act."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import Toy, adapted, bits, outputs, record, shake, tokens, transformer
from torch import nn

import lorica
from lorica.errors import AdapterError, StateError, TargetError

UP = lorica.LoraConfig(r=2, target_modules=["up"])
EVERYTHING = lorica.LoraConfig(
    r=2, target_modules=["up", "down", "embed"], modules_to_save=["head"], bias="all", lora_dropout=0.1
)


def test_adapt_returns_the_model_itself_and_starts_as_the_base() -> None:
    model = Toy()
    before = outputs(model)
    assert lorica.adapt(model, UP) is model
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)


def test_only_the_adapter_trains() -> None:
    model = lorica.adapt(Toy(), UP)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"blocks.{i}.up.lora_{side}.default.weight" for i in range(2) for side in "AB"]


def test_base_keys_and_tensors_stay_what_they_were() -> None:
    model = Toy()
    before = dict(model.named_parameters())
    after = dict(lorica.adapt(model, EVERYTHING.replace(bias="none")).named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_the_same_seed_gives_the_same_adapter() -> None:
    def start() -> bytes:
        torch.manual_seed(3)
        return bits(lorica.extract(lorica.adapt(Toy(), UP)).factors["blocks.0.up"].A)

    assert start() == start()
    torch.manual_seed(5)
    one, other = lorica.adapt(Toy(), UP, seed=7), lorica.adapt(Toy(), UP, seed=7)
    assert bits(lorica.extract(one).factors["blocks.1.up"].A) == bits(
        lorica.extract(other).factors["blocks.1.up"].A
    )


@pytest.mark.parametrize("config", [UP, EVERYTHING])
def test_detach_gives_the_model_back_as_it_was(config: lorica.LoraConfig) -> None:
    model = Toy()
    model.embed.weight.requires_grad_(False)  # the caller's own choice must come back too
    before = record(model)
    lorica.adapt(model, config)
    shake(model)
    assert lorica.detach(model) is model
    assert record(model) == before


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "t5", "vit"])
def test_detach_gives_a_transformers_model_back(name: str) -> None:
    model = transformer(name)
    before = record(model)
    adapted_keys = list(lorica.adapt(model, lorica.LoraConfig(r=2, bias="all")).state_dict())
    assert type(model).__name__ == before.classes[0][1].__name__
    assert type(model) is not before.classes[0][1]
    assert set(before.keys) < set(adapted_keys)
    lorica.adapt(model, lorica.LoraConfig(r=3, target_modules="all-linear"), "second")
    assert record(lorica.detach(model)) == before


def test_detach_gives_an_attention_back() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
    before = record(model)
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["self_attn", "linear1"], bias="lora_only"))
    assert record(lorica.detach(model)) == before


def test_detaching_one_adapter_leaves_the_other() -> None:
    model = adapted(Toy(), UP, "a")
    alone = outputs(model)
    adapted(model, EVERYTHING.replace(target_modules=["down"]), "b", seed=1)
    lorica.active(model, "a")
    lorica.detach(model, "b")
    assert list(lorica.adapters(model)) == ["a"]
    assert type(model.get_submodule("blocks.0.down")) is nn.Linear
    assert type(model.head) is nn.Linear
    assert bits(outputs(model)) == bits(alone)


def test_detaching_the_acting_adapter_leaves_none_acting() -> None:
    model = Toy()
    base = outputs(model)
    adapted(model, UP, "a")
    adapted(model, UP, "b", seed=1)
    lorica.detach(model, "b")
    assert bits(outputs(model)) == bits(base)


def test_adapters_by_name_in_the_order_of_arrival() -> None:
    model = Toy()
    assert lorica.adapters(model) == {}
    lorica.adapt(model, UP, "second-rate")
    lorica.adapt(model, UP.replace(r=3), "a_1")
    assert list(lorica.adapters(model)) == ["second-rate", "a_1"]
    assert lorica.extract(model, "a_1").lora.r == 3


@pytest.mark.parametrize("name", ["", "a.b", "../up", "a/b", "a b", "keys", "forward"])
def test_a_name_that_cannot_be_one_leaves_the_model_alone(name: str) -> None:
    model = Toy()
    before = record(model)
    with pytest.raises(AdapterError, match="name"):
        lorica.adapt(model, UP, name)
    assert record(model) == before


def test_a_name_that_is_taken_is_refused() -> None:
    model = lorica.adapt(Toy(), UP)
    before = record(model)
    with pytest.raises(AdapterError, match=r"already has an adapter named 'default'"):
        lorica.adapt(model, UP)
    assert record(model) == before


def test_a_target_that_fails_leaves_model_and_earlier_adapters_alone() -> None:
    model = adapted(Toy(), EVERYTHING, "a")
    before = record(model)
    with pytest.raises(TargetError):
        lorica.adapt(model, lorica.LoraConfig(target_modules=["up", "upp"]), "b")
    # Only the shapes of the grouped convolution show that the rank cannot be.
    grouped = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1, groups=2))
    untouched = record(grouped)
    with pytest.raises(TargetError, match="groups=2"):
        lorica.adapt(grouped, lorica.LoraConfig(r=3, target_modules=["0", "1"]))
    assert record(model) == before
    assert record(grouped) == untouched


def test_operations_on_a_model_without_adapters_say_so() -> None:
    for operation in (lorica.detach, lorica.disabled, lorica.extract, lorica.merge, lorica.restore):
        with pytest.raises(StateError, match="carries no adapter"):
            operation(Toy())


def test_operations_on_a_part_of_the_model_say_so() -> None:
    model = lorica.adapt(Toy(), UP)
    with pytest.raises(StateError, match="whole model"):
        lorica.disabled(model.blocks)


@pytest.mark.parametrize(
    "config",
    [
        *(UP.replace(init_lora_weights=value) for value in (True, False, "gaussian", "orthogonal", "eva")),
        *(UP.replace(init_lora_weights=value) for value in ("pissa", "pissa_niter_4", "olora", "loftq")),
        EVERYTHING,
        UP.replace(lora_bias=True, init_lora_weights=False),
    ],
)
def test_torchs_default_device_has_no_say(config: lorica.LoraConfig) -> None:
    ids, base = tokens(), Toy().train()

    def made() -> tuple[dict[str, bytes], bytes]:
        torch.manual_seed(2)
        model = lorica.adapt(copy.deepcopy(base), config)
        return {n: bits(p) for n, p in model.named_parameters()}, bits(model(ids))

    expected = made()
    with torch.device("meta"):
        assert made() == expected


def test_a_wrapper_around_the_model_is_seen_through() -> None:
    wrapped = nn.Sequential(lorica.adapt(Toy(), UP))
    assert list(lorica.adapters(wrapped)) == ["default"]
    lorica.adapt(wrapped, UP, "second")
    assert list(lorica.adapters(wrapped[0])) == ["default", "second"]
    lorica.detach(wrapped)
    assert lorica.adapters(wrapped) == {}


def test_names_outside_the_part_that_is_adapted_are_not_passed_over() -> None:
    pair = nn.ModuleDict({"a": lorica.adapt(Toy(), UP), "b": Toy()})
    before = record(pair)
    with pytest.raises(StateError, match=r"a of this ModuleDict carries adapters.* without b\."):
        lorica.adapt(pair, UP, "second")
    assert record(pair) == before
    lorica.adapt(pair["a"], UP, "second")


def test_several_models_adapted_by_themselves_are_not_taken_for_one(tmp_path: Path) -> None:
    pair = nn.ModuleDict({"a": adapted(Toy(), UP), "b": adapted(Toy(), UP)})
    before = record(pair)
    for call in (
        lorica.merge,
        lorica.detach,
        lorica.extract,
        lorica.adapters,
        lorica.disabled,
        lambda model: lorica.save(model, tmp_path),
        lambda model: lorica.adapt(model, UP, "second"),
    ):
        with pytest.raises(StateError, match="a, b of this ModuleDict were each adapted by themselves"):
            call(pair)
    assert record(pair) == before
    assert lorica.adapters(nn.ModuleDict({"a": pair["a"], "again": pair["a"]})).keys() == {"default"}


def test_inference_mode_attaches_frozen() -> None:
    model = lorica.adapt(Toy(), EVERYTHING.replace(inference_mode=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_factors_are_float32_masters_or_better(dtype: torch.dtype) -> None:
    model = lorica.adapt(Toy(dtype=dtype), EVERYTHING)
    expected = torch.promote_types(dtype, torch.float32)
    factors = lorica.extract(model).factors.values()
    assert {tensor.dtype for f in factors for tensor in (f.A, f.B)} == {expected}


def test_adapting_on_the_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        model = Toy()
    lorica.adapt(model, EVERYTHING)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert lorica.trainable_parameters(model).trainable > 0
    assert model(tokens().to("meta")).shape == (3, 3)


class TestActive:
    """`active` and `disabled`."""

    @pytest.fixture
    def model(self) -> nn.Module:
        """A model with adapters a and b, b acting, both different from the base."""
        return adapted(adapted(Toy(), UP, "a"), UP.replace(target_modules=["up", "down"]), "b", seed=1)

    def test_a_plain_call_switches_for_good(self, model: nn.Module) -> None:
        b = outputs(model)
        lorica.active(model, "a")
        a = outputs(model)
        lorica.active(model, "b")
        assert not torch.allclose(a, b)
        assert bits(outputs(model)) == bits(b)

    def test_as_a_context_it_is_undone_however_deep(self, model: nn.Module) -> None:
        b = bits(outputs(model))
        with lorica.active(model, "a"):
            a = bits(outputs(model))
            with lorica.disabled(model):
                base = bits(outputs(model))
                with lorica.active(model, ["b"]):
                    assert bits(outputs(model)) == b
                assert bits(outputs(model)) == base
            assert bits(outputs(model)) == a
        assert bits(outputs(model)) == b
        assert len({a, b, base}) == 3

    def test_an_exception_undoes_it_too(self, model: nn.Module) -> None:
        b = bits(outputs(model))
        with pytest.raises(ZeroDivisionError), lorica.disabled(model):
            raise ZeroDivisionError
        assert bits(outputs(model)) == b

    def test_two_at_once_add_up(self, model: nn.Module) -> None:
        names = lorica.extract(model, "a"), lorica.extract(model, "b")
        lorica.active(model, ["a", "b"])
        both = outputs(model)
        lorica.detach(model)
        with torch.no_grad():
            for adapter in names:
                for path, f in adapter.factors.items():
                    model.get_parameter(f"{path}.weight").add_(f.scale * f.B @ f.A)
        torch.testing.assert_close(outputs(model), both)

    def test_disabled_is_the_base_to_the_bit(self, model: nn.Module) -> None:
        with lorica.disabled(model):
            off = outputs(model)
        assert bits(outputs(lorica.detach(model))) == bits(off)

    def test_it_changes_neither_what_trains_nor_the_mode(self, model: nn.Module) -> None:
        model.get_submodule("blocks.0").train()
        before = record(model).requires_grad, [module.training for module in model.modules()]
        with lorica.active(model, "a"), lorica.disabled(model):
            pass
        lorica.active(model, "a")
        assert (record(model).requires_grad, [module.training for module in model.modules()]) == before

    def test_an_unknown_name_changes_nothing(self, model: nn.Module) -> None:
        b = bits(outputs(model))
        with pytest.raises(
            AdapterError, match=r"no adapter is named 'aa'; did you mean 'a'\?; the model has: 'a', 'b'"
        ):
            lorica.active(model, ["a", "aa"])
        assert bits(outputs(model)) == b

    def test_an_adapter_detached_inside_is_not_missed(self, model: nn.Module) -> None:
        with lorica.active(model, "a"):
            lorica.detach(model, "b")
        assert bits(outputs(model)) == bits(outputs(lorica.detach(model)))


class TestTrainedWhole:
    """Biases and modules that each adapter has for itself."""

    CASES: ClassVar = [
        ("none", []),
        ("lora_only", ["blocks.0.up.bias", "blocks.1.up.bias"]),
        (
            "all",
            [f"blocks.{i}.{part}.bias" for i in range(2) for part in ("up", "down")]
            + ["norm.bias", "head.bias"],
        ),
    ]

    @pytest.mark.parametrize(("bias", "names"), CASES)
    def test_bias_says_which_train(self, bias: str, names: list[str]) -> None:
        model = lorica.adapt(Toy(), UP.replace(bias=bias))
        trained = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
        assert sorted(trained) == sorted(names)
        assert sorted(lorica.extract(model).extras) == sorted(names)

    def test_fused_attention_biases_count(self) -> None:
        model = nn.TransformerEncoderLayer(8, 2, 12)
        lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["self_attn"], bias="lora_only"))
        assert sorted(lorica.extract(model).extras) == ["self_attn.in_proj_bias", "self_attn.out_proj.bias"]

    def test_every_adapter_has_biases_of_its_own_that_start_from_the_base(self) -> None:
        model = Toy()
        base = model.norm.bias.detach().clone()
        adapted(model, UP.replace(bias="all"), "a")
        trained = model.norm.bias
        model.requires_grad_(False)
        lorica.adapt(model, UP.replace(bias="all"), "b")
        assert bits(model.norm.bias) == bits(base)
        shake(model, seed=2)
        other = model.norm.bias
        lorica.active(model, "a")
        assert model.norm.bias is trained
        lorica.active(model, "b")
        assert model.norm.bias is other
        assert not torch.equal(trained, other)
        with lorica.disabled(model):
            assert bits(model.norm.bias) == bits(base)

    def test_every_adapter_has_a_head_of_its_own_that_starts_from_the_base(self) -> None:
        model = Toy()
        base = outputs(model)
        adapted(model, UP.replace(modules_to_save=["head"]), "a")
        a = outputs(model)
        model.requires_grad_(False)
        lorica.adapt(model, UP.replace(modules_to_save=["head"]), "b")
        assert bits(outputs(model)) == bits(base)
        shake(model, seed=2)
        b = outputs(model)
        lorica.active(model, "a")
        assert bits(outputs(model)) == bits(a)
        assert not torch.allclose(a, b)
        assert set(lorica.extract(model, "b").extras) == {"head.weight", "head.bias"}

    @pytest.mark.parametrize("acting", [UP.replace(bias="all"), lorica.FullConfig()])
    @pytest.mark.parametrize(
        "added", [{"modules_to_save": ["head"]}, {"trainable_token_indices": {"embed": [4, 7]}}]
    )
    def test_what_an_adapter_trains_whole_starts_from_the_base_whatever_acts(
        self, acting: lorica.AdapterConfig, added: dict[str, Any]
    ) -> None:
        model = Toy()
        base = outputs(model)
        lorica.adapt(model, acting, "a")
        shake(model)
        lorica.adapt(model, UP.replace(**added), "b")
        assert bits(outputs(model)) == bits(base)

    def test_tables_are_tied_as_in_the_base_whatever_acts(self) -> None:
        model = transformer("gpt2")
        config = lorica.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights="pissa")
        lorica.adapt(model, config, "a")  # in whose head a weight of its own stands
        with pytest.raises(TargetError, match="lm_head: another adapter has made it a LoraLinear"):
            lorica.adapt(model, lorica.LoraConfig(r=2, trainable_token_indices=[4, 7]), "b")

    def test_a_head_that_cannot_be_copied(self) -> None:
        model = Toy()
        adapter = lorica.extract(adapted(Toy(), UP.replace(modules_to_save=["norm", "head"])))
        model.head.last = model.head(torch.zeros(6))  # what a call left behind
        before = record(model)
        for put_on in (
            lambda: lorica.adapt(model, UP.replace(modules_to_save=["norm", "head"])),
            lambda: lorica.attach(model, adapter),
        ):
            with pytest.raises(TargetError, match="head cannot be trained whole, for it cannot be copied"):
                put_on()
            assert record(model) == before
            assert type(model.head) is nn.Linear
        lorica.adapt(model, UP.replace(modules_to_save=["norm"]), "a")
        with pytest.raises(TargetError, match="head cannot be trained whole"):
            lorica.adapt(model, UP.replace(modules_to_save=["norm", "head"]), "b")
        assert list(lorica.adapters(model)) == ["a"]
        assert record(lorica.detach(model)) == before

    def test_two_biases_or_heads_cannot_act_together(self) -> None:
        for what in ({"bias": "all"}, {"modules_to_save": ["head"]}):
            model = lorica.adapt(lorica.adapt(Toy(), UP.replace(**what), "a"), UP.replace(**what), "b")
            with pytest.raises(AdapterError, match="'a', 'b' cannot act together"):  # noqa: PT012
                lorica.active(model, ["a", "b"])
                outputs(model)  # two heads clash where they would act

    def test_one_adapter_may_bring_a_head_and_another_act_beside_it(self) -> None:
        model = adapted(Toy(), UP.replace(modules_to_save=["head"], bias="all"), "a")
        adapted(model, UP, "b", seed=1)
        lorica.active(model, ["a", "b"])
        assert outputs(model).shape == (3, 3)

    def test_a_tied_bias_stays_tied(self) -> None:
        model = transformer("bert-masked")
        lorica.adapt(model, lorica.LoraConfig(r=2, bias="all"))
        predictions = model.cls.predictions
        assert predictions.decoder.bias is predictions.bias
        lorica.detach(model)
        assert predictions.decoder.bias is predictions.bias

    def test_a_module_inside_another_is_trained_with_it(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        lorica.adapt(model, UP.replace(modules_to_save=["1", "1.0"], target_modules=["0"]))
        saved = set(lorica.extract(model).extras)
        assert saved == {f"1.{part}.{leaf}" for part in (0, 1) for leaf in ("weight", "bias")}

    def test_an_adapter_taken_from_another_brings_its_biases_whichever_acts(self) -> None:
        model = adapted(Toy(), UP.replace(bias="all"), "a")
        a = outputs(model)
        lorica.attach(
            model, lorica.extract(model, "a"), "twin"
        )  # its biases equal those that act now, not the base's
        lorica.active(model, "twin")
        assert bits(outputs(model)) == bits(a)
        lorica.detach(model, "a")
        assert bits(outputs(model)) == bits(a)
