"""Functions and names of PEFT's that scripts use beside training."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica.peft as peft
from lorica.errors import AdapterError, ConfigError, LoricaWarning, NotCarried, StateError, TargetError
from lorica.peft import LoraConfig, PeftModel, get_peft_model
from lorica.peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper, infer_device, transpose


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


x = torch.randn(4, 6)


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.4)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "all"},
    "head": {"modules_to_save": ["head"]},
    "bias on B": {"bias": "lora_only", "lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [False, True])
class TestOfTheBase:
    def test_its_own_tensors_by_its_own_names(self, kind: str, merged: bool) -> None:
        before = {key: tensor.clone() for key, tensor in Net().state_dict().items()}
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], **KINDS[kind]))
        fill(model)
        y = model(x)
        if merged:
            model.merge_adapter()
        state = peft.get_base_model_state_dict(model)
        assert list(state) == list(before)
        for key, tensor in before.items():
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)
        torch.testing.assert_close(model(x), y)  # looking changes nothing

    def test_counts_do_not_change_by_merging(self, kind: str, merged: bool) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], **KINDS[kind]))
        before = model.get_nb_trainable_parameters(), model.get_model_status().total_params
        if merged:
            model.merge_adapter()
        assert (model.get_nb_trainable_parameters(), model.get_model_status().total_params) == before


class TestAnotherBase:
    def test_it_is_loaded_below_the_adapter(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], bias="all"))
        other = {key: torch.randn_like(tensor) for key, tensor in Net().state_dict().items()}
        result = peft.set_base_model_state_dict(model, other)
        assert result == ([], [])
        with model.disable_adapter():
            plain = Net()
            plain.load_state_dict(other)
            torch.testing.assert_close(model(x), plain(x))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda state: state.pop("head.bias"), r"Missing key\(s\).*head.bias"),
            (lambda state: state.update(more=torch.ones(1)), r"Unexpected key\(s\).*more"),
            (lambda state: state.update({"head.bias": torch.ones(1)}), r"shape of head.bias"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, change: Any, match: str) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        state = {key: tensor + 1 for key, tensor in Net().state_dict().items()}
        change(state)
        with pytest.raises(RuntimeError, match=match):
            peft.set_base_model_state_dict(model, state)
        assert torch.equal(model.get_base_model().body.weight, Net().body.weight)  # type: ignore[union-attr]

    def test_not_below_what_was_taken_out_of_it(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], init_lora_weights="pissa"))
        with pytest.raises(StateError, match="'default' was taken out of the base"):
            peft.set_base_model_state_dict(model, Net().state_dict())


class TestAgain:
    def test_the_one_that_is_there_gives_way(self) -> None:
        base = Net()
        get_peft_model(base, LoraConfig(r=2, target_modules=["body"]))
        with pytest.warns(LoricaWarning, match="for a second time"):
            model = get_peft_model(base, LoraConfig(r=4, target_modules=["head"]))
        assert model.peft_config["default"].r == 4
        assert type(base.body) is nn.Linear
        assert model.active_adapters == ["default"]

    def test_one_that_cannot_be_put_on_leaves_it(self) -> None:
        base = Net()
        first = get_peft_model(base, LoraConfig(r=2, target_modules=["body"]))
        fill(first)
        y = base(x)
        with pytest.warns(LoricaWarning), pytest.raises(TargetError):
            get_peft_model(base, LoraConfig(target_modules=["nothing"]))
        torch.testing.assert_close(base(x), y, rtol=0, atol=0)

    def test_a_saved_one_onto_the_base_it_was_trained_on(self, tmp_path: Path) -> None:
        base = Net()
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["body"]))
        fill(model)
        y = base(x)
        model.save_pretrained(tmp_path)
        with pytest.warns(LoricaWarning):
            again = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(again(x), y, rtol=0, atol=0)

    def test_the_start_is_what_it_would_have_been(self) -> None:
        def start(base: Net) -> Tensor:
            torch.manual_seed(3)
            get_peft_model(base, LoraConfig(r=2, target_modules=["body"]))
            return base.body.lora_A["default"].weight.detach()  # type: ignore[index, union-attr]

        base = Net()
        first = start(base)
        with pytest.warns(LoricaWarning):
            assert torch.equal(start(base), first)


def test_the_configuration_that_is_given_is_the_models_own(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["body"])
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Net(), tmp_path, config=config)
    assert model.peft_config["default"] is config
    assert config.inference_mode


def test_a_second_adapter_that_trains_biases() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], bias="all"))
    with pytest.raises(ConfigError, match="only 1 adapter with bias"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["body"], bias="lora_only"))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", LoraConfig(r=2, target_modules=["body"]))


class TestWithoutValues:
    def test_an_adapter_on_the_meta_device_takes_its_values(self) -> None:
        config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
        source = get_peft_model(Net(), config)
        fill(source)
        model = get_peft_model(Net(), config, low_cpu_mem_usage=True)
        assert {p.device.type for n, p in model.named_parameters() if "default" in n} == {"meta"}
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(source), low_cpu_mem_usage=True)
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
        assert model.get_nb_trainable_parameters() == source.get_nb_trainable_parameters()

    def test_it_needs_all_of_them(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]), low_cpu_mem_usage=True)
        with pytest.raises(AdapterError, match=r"(?s)meta device.*body\.lora_A"):
            peft.set_peft_model_state_dict(model, {})


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("how", ["init_lora_weights", "path_initial"])
def test_pefts_recipe_for_a_start_that_changes_the_base(init: str, how: str, tmp_path: Path) -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], init_lora_weights=init))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    fill(model)
    y = model(x)
    start = tmp_path / "start" if how == "path_initial" else None
    model.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=start)
    for trainable in (False, True):
        again = PeftModel.from_pretrained(Net(), tmp_path / "trained", is_trainable=trainable)
        torch.testing.assert_close(again(x), y)


def test_parameters_alone_on_an_unknown_architecture() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_parameters=["body.weight"]))
    assert model.base_model.targeted_parameter_names == ["body.weight"]
    assert model.base_model.targeted_module_names == []
    with pytest.raises(TargetError, match="Please specify `target_modules`"):
        get_peft_model(Net(), LoraConfig(r=2))


class TestWhileMerged:
    def test_it_can_be_looked_into(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
        fill(model)
        y, keys = model(x), list(model.state_dict())
        model.merge_adapter()
        base: Any = model.get_base_model()
        assert isinstance(base.body, peft.tuners.lora.LoraLayer)
        assert isinstance(base.head, ModulesToSaveWrapper)
        assert base.body.merged_adapters == ["default"]
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(x), y)
        with pytest.warns(LoricaWarning, match="All adapters are already merged"):
            model.merge_adapter()
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), y)

    def test_deleting(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        model.add_adapter("other", LoraConfig(r=2, target_modules=["body"]))
        fill(model)
        y = model(x)
        model.merge_adapter()
        with pytest.raises(StateError, match="while they are merged"):
            model.delete_adapter("default")
        model.delete_adapter("other")
        torch.testing.assert_close(model(x), y)
        assert model.base_model.merged_adapters == ["default"]
        with pytest.raises(AdapterError, match="Adapter other does not exist"):
            model.delete_adapter("other")


class TestNames:
    @pytest.mark.parametrize(
        "path",
        [
            "import_utils.is_bnb_available",
            "mapping.PEFT_TYPE_TO_TUNER_MAPPING",
            "mapping_func.get_peft_model",
            "functional.set_adapter",
            "helpers.DoraCaching",
            "tuners.BaseTunerLayer",
            "tuners.lora.bnb.Linear4bit",
            "tuners.lora.layer.Conv1d",
            "tuners.tuners_utils.check_target_module_exists",
            "utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
            "utils.constants.SAFETENSORS_WEIGHTS_NAME",
            "utils.error.NoMatchingPeftModuleError",
            "utils.integrations.dequantize_module_weight",
            "utils.loftq_utils.replace_lora_weights_loftq",
            "utils.other.fsdp_auto_wrap_policy",
            "utils.peft_types.TaskType",
            "cast_mixed_precision_params",
        ],
    )
    def test_they_are_where_pefts_are(self, path: str) -> None:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(f"lorica.peft.{module}".rstrip(".")), name)

    def test_as_attributes_of_the_package(self) -> None:
        script = (
            "import lorica.peft as peft; peft.tuners.lora.layer.Linear; peft.utils.other; peft.functional"
        )
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

    @pytest.mark.parametrize("name", ["PrefixTuningConfig", "IA3Config", "MicaConfig", "AdaLoraModel"])
    def test_other_methods_are_refused_by_name(self, name: str) -> None:
        with pytest.raises(ImportError, match=f"{name}: lorica.peft carries PEFT's LoRA") as error:
            exec(f"from lorica.peft import {name}")
        assert isinstance(error.value, NotCarried)
        assert not hasattr(peft, "NoSuchThing")

    def test_the_version_counts_as_pefts(self) -> None:
        from packaging.version import Version

        assert Version("0.21.2") <= Version(peft.__version__) < Version("0.21.3")


class TestHelpers:
    def test_mixed_precision(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        peft.cast_mixed_precision_params(model, torch.bfloat16)
        dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}

    def test_small_ones(self) -> None:
        weight = nn.Parameter(torch.ones(2, 3))
        assert transpose(weight, False) is weight
        assert isinstance(transpose(weight, True), nn.Parameter)
        assert transpose(weight.data, True).shape == (3, 2)
        assert infer_device() in ("cpu", "cuda", "mps", "xpu")

    @pytest.mark.parametrize(
        ("settings", "key", "expected"),
        [
            ({"target_modules": ["q"]}, "layers.0.q", True),
            ({"target_modules": ["q"]}, "layers.0.qq", False),
            ({"target_modules": r".*\.0\.q"}, "layers.0.q", True),
            ({"target_modules": ["q"], "exclude_modules": ["0.q"]}, "layers.0.q", False),
            ({"target_modules": ["q"], "layers_to_transform": [1]}, "layers.0.q", False),
            ({"target_modules": ["q"], "layers_to_transform": 0}, "layers.0.q", True),
            ({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "h"}, "layers.0.q", False),
        ],
    )
    def test_whether_a_module_is_meant(self, settings: dict[str, Any], key: str, expected: bool) -> None:
        check = peft.tuners.tuners_utils.check_target_module_exists
        assert check(LoraConfig(**settings), key) is expected

    def test_tokens_of_a_table(self) -> None:
        body = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3))
        settings = LoraConfig(r=1, target_modules=["1"], trainable_token_indices={"0": [1, 3]})
        model: Any = get_peft_model(body, settings).get_base_model()
        assert isinstance(model[0], TrainableTokensWrapper)
        assert model[0].token_adapter.token_indices == {"default": [1, 3]}
        assert model[0].original_module.weight is model[0].base_weight


class TestRefused:
    @pytest.mark.parametrize("targets", [None, [], ""])
    def test_nothing_at_all(self, targets: Any) -> None:
        with pytest.raises(TargetError, match="`target_parameters`"):
            get_peft_model(Net(), LoraConfig(target_modules=targets))

    def test_leaving_out_what_nobody_targets(self) -> None:
        with pytest.warns(LoricaWarning, match="but no modules were excluded"):
            get_peft_model(Net(), LoraConfig(target_modules=["body"], exclude_modules=["head"]))
        with pytest.raises(TargetError, match="All modules were excluded"):
            get_peft_model(Net(), LoraConfig(target_modules=["body"], exclude_modules=["body"]))

    def test_rows_of_what_is_merged_or_not_there(self) -> None:
        model = get_peft_model(Net(), LoraConfig(target_modules=["body"])).eval()
        with pytest.raises(AdapterError, match=r"non-existing adapter\(s\): other; the model has: 'default'"):
            model(x, adapter_names=["default", "other", "__base__", "default"])
        with pytest.raises(AdapterError, match="got 2 and 4 respectively"):
            model(x, adapter_names=["default", "__base__"])
        model.merge_adapter()
        with pytest.raises(StateError, match="call `unmerge_adapter` first"):
            model(x, adapter_names=["default"] * 4)

    @pytest.mark.parametrize(
        ("settings", "kind"),
        [
            ({"modules_to_save": ["head"]}, "ModulesToSaveWrapper"),
            ({"trainable_token_indices": {"table": [0]}}, "TrainableTokensWrapper"),
        ],
    )
    def test_two_that_train_the_same_whole(self, settings: dict[str, Any], kind: str) -> None:
        net = Net()
        net.table = nn.Embedding(3, 2)
        model = get_peft_model(net, LoraConfig(target_modules=["body"], **settings))
        model.add_adapter("other", LoraConfig(target_modules=["body"], **settings))
        with pytest.raises(AdapterError, match=f"Only one adapter can be set at a time for {kind}"):
            model.base_model.set_adapter(["default", "other"])
        assert model.active_adapters == ["default"]

    def test_rows_of_what_is_read_past_its_layer(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_parameters=["body.weight"])).eval()
        with pytest.raises(ValueError, match=r"lora\.ParamWrapper does not support mixed adapter batches"):
            model(x, adapter_names=["default", "__base__", "default", "default"])

    def test_a_bias_on_b_of_a_layer_without_one(self) -> None:
        base = nn.Sequential(nn.Linear(3, 3, bias=False))
        with pytest.warns(LoricaWarning, match="merging LoRA weights won't be possible: 0"):
            get_peft_model(base, LoraConfig(target_modules=["0"], lora_bias=True))


def test_a_script_s_own_model_is_nothing_on_the_hub(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["body"], base_model_name_or_path="Net")
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    assert "base_model" not in (tmp_path / "README.md").read_text()


class TestValuesOfTheBase:
    """An adapter's values that hold biases which the adapter on the model does not train."""

    def test_they_act_while_it_does(self) -> None:
        source = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], bias="all"))
        fill(source)
        state = peft.get_peft_model_state_dict(source)
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        assert peft.set_peft_model_state_dict(model, state).unexpected_keys == []
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), Net()(x), rtol=0, atol=0)

    def test_they_are_saved_with_it(self, tmp_path: Path) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        state = {**peft.get_peft_model_state_dict(model), "base_model.model.head.bias": torch.ones(3)}
        peft.set_peft_model_state_dict(model, state)
        y = model(x)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(x), y, rtol=0, atol=0)
        model.merge_adapter()
        torch.testing.assert_close(model(x), y)

    def test_what_is_the_bases_already_is_not_brought(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        state = {"base_model.model.body.base_layer.bias": Net().body.bias.detach(), "nothing": torch.ones(1)}
        result = peft.set_peft_model_state_dict(model, state)
        assert result.unexpected_keys == ["base_model.model.nothing"]
        assert model.base_model.adapter_state.slots == {}


def test_names_of_layers_in_the_status() -> None:
    net = Net()
    net.table = nn.Embedding(3, 2)
    config = LoraConfig(
        target_modules=["body"], target_parameters=["head.weight"], trainable_token_indices={"table": [0]}
    )
    found = {layer.name: layer.module_type for layer in get_peft_model(net, config).get_layer_status()}
    assert found == {
        "model.body": "lora.Linear",
        "model.head": "lora.ParamWrapper",
        "model.table.token_adapter": "TrainableTokensLayer",
    }


def test_pefts_file_of_a_resized_table_with_trained_rows(tmp_path: Path) -> None:
    def net() -> Any:
        torch.manual_seed(1)
        model = Net()
        model.table = nn.Embedding(5, 2)
        return model

    config = LoraConfig(r=2, target_modules=["body"], trainable_token_indices={"table": [1]})
    source = get_peft_model(net(), config)
    state = peft.get_peft_model_state_dict(source)
    table = torch.randn(5, 2)
    whole = {**state, "base_model.model.table.token_adapter.base_layer.weight": table}
    source.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(whole, tmp_path / "adapter_model.bin")
    model: Any = PeftModel.from_pretrained(net(), tmp_path).get_base_model()
    expected = table.clone()
    expected[1] = net().table.weight[1].detach()
    torch.testing.assert_close(model.table(torch.arange(5)), expected, rtol=0, atol=0)


def test_a_choice_made_in_another_thread_holds_for_all() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["body"]))

    def in_another_thread(call: Callable[[], object]) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(call).result()

    in_another_thread(lambda: model.set_adapter("two"))
    assert model.active_adapters == ["two"]
    state: Any = model.base_model.adapter_state
    assert state.active == ("two",)
    in_another_thread(model.base_model.disable_adapter_layers)
    assert state.active == ()
    in_another_thread(model.base_model.enable_adapter_layers)
    assert state.active == ("two",)
