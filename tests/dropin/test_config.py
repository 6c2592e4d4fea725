"""`lorica.peft`'s configurations: assigned to, saved, read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lorica.config import CordaConfig, EvaConfig
from lorica.errors import ConfigError, LoricaWarning
from lorica.peft import LoraConfig, PeftConfig, get_peft_model
from lorica.peft.config import __version__ as version


class TestSaved:
    @pytest.mark.parametrize("frozen", [True, False])
    def test_it_comes_back_as_it_was_and_trains_as_it_did(self, frozen: bool, tmp_path: Path) -> None:
        config = LoraConfig(r=2, target_modules=["0"], inference_mode=frozen)
        config.save_pretrained(tmp_path)
        again = PeftConfig.from_pretrained(tmp_path)
        assert again.to_dict() == config.to_dict()
        model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), again)
        assert model.get_nb_trainable_parameters()[0] == (0 if frozen else 12)

    def test_the_version_of_a_file_is_kept(self, tmp_path: Path) -> None:
        assert LoraConfig().peft_version == version
        LoraConfig(peft_version="0.17.0").save_pretrained(tmp_path)
        assert LoraConfig.from_pretrained(tmp_path).peft_version == "0.17.0"

    def test_settings_of_an_idle_start_stay(self, tmp_path: Path) -> None:
        config: Any = LoraConfig(target_modules=["0"])
        config.eva_config = EvaConfig(rho=7.5)
        config.save_pretrained(tmp_path)
        with pytest.warns(LoricaWarning, match="`eva_config` specified but will be ignored"):
            assert LoraConfig.from_pretrained(tmp_path).eva_config == EvaConfig(rho=7.5)

    def test_how_it_ran_is_no_field(self, tmp_path: Path) -> None:
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({"r": 4, "runtime_config": {"ephemeral_gpu_offload": True}}))
        assert PeftConfig.from_json_file(path) == {"r": 4}


class TestAssigned:
    @pytest.mark.parametrize(
        "order", [("init_lora_weights", "corda_config"), ("corda_config", "init_lora_weights")]
    )
    def test_two_fields_that_go_together_in_either_order(
        self, order: tuple[str, str], tmp_path: Path
    ) -> None:
        settings = CordaConfig(cache_file=tmp_path / "cache", covariance_file=tmp_path / "covariance")
        values: dict[str, Any] = {"init_lora_weights": "corda", "corda_config": settings}
        config = LoraConfig(target_modules=["0"])
        for name in order:
            setattr(config, name, values[name])
        assert config.checked().corda_config == settings
        assert settings.cache_file == str(tmp_path / "cache")

    def test_what_cannot_be_used_is_refused_where_it_is_used(self) -> None:
        config: Any = LoraConfig(target_modules=["0"])
        config.init_lora_weights, config.r = "orthogonal", 3
        model = nn.Sequential(nn.Linear(3, 3))
        with pytest.raises(ConfigError, match="splits the rank in halves"):
            get_peft_model(model, config)
        assert type(model[0]) is nn.Linear

    def test_a_field_that_is_not_carried_reads_as_nothing_and_refuses_more(self) -> None:
        config = LoraConfig()
        assert config.arrow_config is None
        assert config.qalora_group_size == 16
        config.use_bdlora = None
        with pytest.raises(ConfigError, match="VeLoRA is not carried"):
            config.velora_config = {"num_groups": 8}

    def test_a_name_that_nobody_knows(self) -> None:
        config: Any = LoraConfig()
        with pytest.raises(ConfigError, match=r"no field 'lora_alhpa'.*'lora_alpha'"):
            config.lora_alhpa = 4
        assert not hasattr(config, "lora_alhpa")


def test_names_of_modules_equal_a_set_as_in_peft() -> None:
    config: Any = LoraConfig(target_modules=["q", "k"], exclude_modules=["0.q"])
    assert config.target_modules == {"k", "q"}
    assert config.target_modules == ["q", "k"]
    assert config.target_modules != {"k"}
    assert config.exclude_modules == {"0.q"}
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules="all-linear"))
    assert model.peft_config["default"].target_modules == {"0"}
    assert LoraConfig.from_dict(config.to_dict()) == config
