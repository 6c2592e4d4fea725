"""What a configuration asks for and a model does not have: PEFT ignores it, and the drop-in says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Toy, transformer
from torch import nn

import lorica
from lorica.errors import AdapterError, ConfigError, LoricaWarning, StateError, TargetError
from lorica.peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from lorica.peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from lorica.peft.utils.hotswap import prepare_model_for_compiled_hotswap

UPS = [name for name, _ in Toy().named_modules() if name.endswith(".up")]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_key_that_matches_nothing_is_named_and_left_out(field: str) -> None:
    config = LoraConfig(r=2, target_modules=["up"], **{field: {"up": 4, "typo": 3}})
    with pytest.warns(RuntimeWarning, match=rf"{field} keys did not match any targeted module.*\['typo'\]"):
        model = get_peft_model(Toy(), config)
    assert getattr(model.peft_config["default"], field) == {"up": 4}
    assert getattr(config, field) == {"up": 4, "typo": 3}  # the one that was passed is not changed
    with pytest.warns(LoricaWarning, match="typo"):
        model.add_adapter("other", config)
    with pytest.raises(TargetError, match="typo"):
        lorica.adapt(Toy(), config)


@pytest.mark.parametrize("excluded", [["typo"], ".*typo"])
def test_an_exclusion_that_matches_nothing_is_named(excluded: list[str] | str) -> None:
    config = LoraConfig(r=2, target_modules=["up"], exclude_modules=excluded)
    with pytest.warns(UserWarning, match="You have passed exclude_modules=.* but no modules were excluded"):
        model = get_peft_model(Toy(), config)
    assert model.base_model.targeted_module_names == UPS


@pytest.mark.parametrize("name", ["lora", "lora_", "a"])
def test_a_name_that_peft_confuses_with_its_prefix_is_said(name: str) -> None:
    with pytest.warns(LoricaWarning, match=f"Adapter name '{name}' should not be contained in the prefix"):
        get_peft_model(Toy(), LoraConfig(r=2, target_modules=["up"]), adapter_name=name)


def test_another_base_than_the_configurations_is_said() -> None:
    model = Toy()
    model.name_or_path = "own"  # type: ignore[assignment]
    config = LoraConfig(r=2, target_modules=["up"], base_model_name_or_path="given")
    with pytest.warns(LoricaWarning, match="was renamed from 'given' to 'own'"):
        made = get_peft_model(model, config)
    assert made.peft_config["default"].base_model_name_or_path == "own"


def test_default_targets_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    model.config = {"model_type": "toy"}  # type: ignore[assignment]
    monkeypatch.setitem(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "toy", ["up"])
    assert get_peft_model(model, LoraConfig(r=2)).base_model.targeted_module_names == UPS


def test_every_module_has_what_is_per_adapter_by_name() -> None:
    model = get_peft_model(Toy(), LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    toy = model.get_base_model()
    for path in ("blocks.0.up", "head"):
        module: Any = toy.get_submodule(path)
        for name in module.adapter_layer_names + module.other_param_names:
            assert name == "lora_magnitude_vector" or "default" in getattr(module, name)


def test_hot_swap_is_prepared_on_adapters_alone() -> None:
    with pytest.raises(StateError, match="No adapter layers found on the model"):
        prepare_model_for_compiled_hotswap(nn.Linear(2, 2))
    model = get_peft_model(Toy(), LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(ValueError, match="check_compiles should be one of"):
        prepare_model_for_compiled_hotswap(model, check_compiled="perhaps")


class Lookup(nn.Module):
    """An embedding and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)
        self.up = nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.up(self.embed_tokens(tokens))


@pytest.mark.parametrize("at_once", [True, False])
def test_rows_that_two_adapters_train_are_not_merged(at_once: bool) -> None:
    rows = {"one": [0, 1], "two": [1, 2]}
    model = get_peft_model(
        Lookup(),
        LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"embed_tokens": rows["one"]}),
        "one",
    )
    model.add_adapter(
        "two", LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"embed_tokens": rows["two"]})
    )
    first = [] if at_once else ["one"]
    if first:
        model.base_model.merge_adapter(first)
    with pytest.raises(ValueError, match="already defined and would result in undefined merging behavior"):
        model.base_model.merge_adapter(["two"] if first else ["one", "two"])
    assert model.base_model.merged_adapters == first


@pytest.mark.parametrize("idle", ["target_modules", "target_parameters"])
def test_targets_of_one_kind_that_match_nothing_beside_the_others(idle: str) -> None:
    right = {"target_modules": ["up"], "target_parameters": ["head.weight"]}
    wrong = {"target_modules": ["typo"], "target_parameters": ["typo.weight"]}
    config = LoraConfig(r=2, **right | {idle: wrong[idle]})  # pyright: ignore[reportArgumentType]
    with pytest.warns(RuntimeWarning, match=f"{idle}=.*typo.* were set but no .* was matched"):
        model = get_peft_model(Toy(), config)
    tuner = model.base_model
    named = tuner.targeted_module_names or tuner.targeted_parameter_names
    assert named == (UPS if idle == "target_parameters" else right["target_parameters"])
    with pytest.raises(TargetError, match="typo"):
        get_peft_model(Toy(), LoraConfig(r=2, **wrong))  # pyright: ignore[reportArgumentType]


def test_a_state_says_which_modules_are_adapted() -> None:
    config: Any = LoraConfig(r=2, target_modules=["up", "down"])
    model = inject_adapter_in_model(config, Toy())
    state = get_peft_model_state_dict(model)
    config.exclude_modules = ["blocks.0.up"]
    with pytest.warns(RuntimeWarning, match=r"state_dict contained these .*: \['blocks.0.up'\]"):
        again = inject_adapter_in_model(config, Toy(), state_dict=state)
    assert get_peft_model_state_dict(again).keys() == state.keys()
    fewer = {f"_orig_mod.{key}": value for key, value in state.items() if "blocks.0" not in key}
    with pytest.warns(RuntimeWarning, match=r"PEFT config contained these .*: \['blocks.0.down'\]"):
        again = inject_adapter_in_model(config, Toy(), state_dict=fewer)
    assert len(get_peft_model_state_dict(again)) == len(fewer)


def test_a_state_does_not_say_which_parameters_are_adapted() -> None:
    config = LoraConfig(r=2, target_parameters=["head.weight"])
    state = get_peft_model_state_dict(inject_adapter_in_model(config, Toy()))
    with pytest.raises(ConfigError, match="config uses `target_parameters`"):
        inject_adapter_in_model(config, Toy(), state_dict=state)


def test_custom_wrappers_are_refused() -> None:
    with pytest.raises(ConfigError, match="puts no wrapper around a layer"):
        LoraConfig(r=2)._register_custom_module({nn.Linear: nn.Linear})


def test_the_one_that_is_assigned_acts() -> None:
    model = get_peft_model(Toy(), LoraConfig(r=2, target_modules=["up"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model.active_adapter = "other"
    assert model.active_adapters == model.base_model.active_adapter == ["other"]
    model.base_model.active_adapter = ["default", "other"]
    assert model.active_adapter == ["default", "other"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    with pytest.raises(AdapterError, match="no adapter is named 'typo'"):
        model.active_adapter = "typo"


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_are_not_tied_after_a_merge_are_said(tied: bool) -> None:
    """Also where the configuration alone said so: transformers does not tie what a file holds apart."""
    base = transformer("llama")
    base.config.tie_word_embeddings = True
    if tied:
        base.tie_weights()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="Setting `tie_word_embeddings=False`"):
        merged: Any = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
