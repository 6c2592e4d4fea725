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
from dropin.net import Net, x
from torch import nn

import lorica.peft as peft
from lorica.errors import AdapterError, ConfigError, LoricaWarning, NotCarried, StateError, TargetError
from lorica.peft import LoraConfig, get_peft_model
from lorica.peft.utils import TrainableTokensWrapper, infer_device, transpose


def test_a_second_adapter_that_trains_biases() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], bias="all"))
    with pytest.raises(ConfigError, match="only 1 adapter with bias"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["body"], bias="lora_only"))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", LoraConfig(r=2, target_modules=["body"]))


def test_parameters_alone_on_an_unknown_architecture() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_parameters=["body.weight"]))
    assert model.base_model.targeted_parameter_names == ["body.weight"]
    assert model.base_model.targeted_module_names == []
    with pytest.raises(TargetError, match="Please specify `target_modules`"):
        get_peft_model(Net(), LoraConfig(r=2))


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
            ({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": ""}, "h.0.q", True),
            ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "h"}, "h.1.h.0.q", True),
            (
                {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": r"\d+\.h"},
                "h.1.h.0.q",
                True,
            ),
            (
                {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": r"\d+\.h"},
                "h.1.h.0.q",
                False,
            ),
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
