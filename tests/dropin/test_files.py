"""What loading and saving take beside a folder."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import Toy, shake, tokens, transformer
from tiny import outputs as answers
from torch import Tensor

import lorica
from lorica.errors import AdapterError, ConfigError, FileError, LoricaWarning
from lorica.peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_config,
    get_peft_model,
    load_peft_weights,
)


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def wrapped(**settings: Any) -> PeftModel:
    model = get_peft_model(toy(), LoraConfig(**{"r": 2, "target_modules": ["up"]} | settings))
    shake(model)
    return model.eval()


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    return model(tokens())


class TestConfiguration:
    def test_a_field_is_checked_when_it_is_assigned(self) -> None:
        config: Any = LoraConfig(r=4, task_type=TaskType.SEQ_CLS)
        config.r = 8
        config.target_modules = {"v", "q"}
        assert (config.r, config.target_modules, config.task_type) == (8, ["q", "v"], "SEQ_CLS")
        with pytest.raises(ConfigError, match="r must be"):
            config.r = 0
        with pytest.raises(ConfigError, match=r"no field 'lora_alhpa'.*lora_alpha"):
            config.lora_alhpa = 3
        assert config.r == 8
        assert copy.deepcopy(config) == config

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("velora_config", {"num_groups": 2}),
            ("arrow_config", {"top_k": 1}),
            ("kasa_config", {"beta": 1}),
            ("use_bdlora", {"nblocks": 2}),
            ("monteclora_config", {"a": 1}),
            ("alora_invocation_tokens", [1]),
            ("use_qalora", True),
            ("megatron_config", {"a": 1}),
            ("init_lora_weights", "mica"),
            ("peft_type", "IA3"),
        ],
    )
    def test_what_is_not_carried_is_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=name):
            LoraConfig(**{name: value})
        with pytest.raises(ConfigError, match=name):
            get_peft_config({"peft_type": "LORA", name: value})

    def test_there_and_back(self, tmp_path: Path) -> None:
        config = LoraConfig(r=3, target_modules=["up"], inference_mode=False)
        config.save_pretrained(tmp_path)
        again = PeftConfig.from_pretrained(tmp_path)
        assert type(again) is LoraConfig
        assert again == config

    def test_the_one_that_is_passed_is_not_changed(self) -> None:
        config = LoraConfig(r=2, target_modules="all-linear")
        before = copy.deepcopy(config)
        get_peft_model(toy(), config)
        assert config == before

    def test_lorica_s_own_serves_too(self) -> None:
        model = get_peft_model(toy(), lorica.LoraConfig(r=2, target_modules=["up"]))
        model.peft_config["default"].base_model_name_or_path = "somebody/base"
        assert model.active_peft_config.base_model_name_or_path == "somebody/base"


class TestLoading:
    def test_renamed_modules(self, tmp_path: Path) -> None:
        model = wrapped()
        model.save_pretrained(tmp_path)
        tensors = load_peft_weights(tmp_path)
        old = {key.replace(".up.", ".raise."): tensor for key, tensor in tensors.items()}
        save_file(old, tmp_path / "adapter_model.safetensors")
        again = PeftModel.from_pretrained(toy(), tmp_path, key_mapping={r"\.raise\.": ".up."})
        torch.testing.assert_close(outputs(again), outputs(model))
        with pytest.raises(AdapterError, match=r"blocks\.0\.sideways is not in the model"):
            PeftModel.from_pretrained(toy(), tmp_path, key_mapping={"raise": "sideways"})
        wrong: list[dict[Any, Any]] = [{"(": ""}, {"up": r"\9"}, {"up": None}, {r"blocks\.\d": "blocks.0"}]
        for key_mapping in wrong:
            with pytest.raises(ConfigError, match="key_mapping"):
                PeftModel.from_pretrained(toy(), tmp_path, key_mapping=key_mapping)

    def test_a_head_of_another_size_stays_the_models(self, tmp_path: Path) -> None:
        model = wrapped(modules_to_save=["head"])
        model.save_pretrained(tmp_path)
        base = toy()
        base.head = torch.nn.Linear(6, 5)
        with pytest.raises(AdapterError, match="shape of head"):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        with pytest.warns(LoricaWarning, match=r"head\.bias, head\.weight"):
            again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, ignore_mismatched_sizes=True)
        head: Any = again.get_submodule("base_model.model.head.modules_to_save.default")
        torch.testing.assert_close(head.weight.detach(), base.head.weight.detach())

    def test_what_means_nothing_is_refused(self, tmp_path: Path) -> None:
        wrapped().save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="'devcie_map'; did you mean 'device_map'"):
            PeftModel.from_pretrained(toy(), tmp_path, devcie_map="auto")
        with pytest.raises(ConfigError, match="'revison'; did you mean 'revision'"):
            PeftConfig.from_pretrained(tmp_path, revison="main")
        with pytest.warns(LoricaWarning, match="torch_dtype is for loading the base"):
            PeftModel.from_pretrained(toy(), tmp_path, torch_dtype=torch.float16)
        with pytest.raises(ConfigError, match="AutoPeftModelFor"):
            AutoPeftModel.from_pretrained(transformer_adapter(tmp_path / "t"))

    @pytest.mark.parametrize(
        "mapping",
        [
            ["x"],
            {"parent_library": 5, "base_model_class": "x"},
            {"parent_library": "transformers", "base_model_class": "NoSuchModel"},
            {"parent_library": "transformers.nowhere", "base_model_class": "BertModel"},
            {"parent_library": "transformers.utils", "base_model_class": "logging"},
        ],
    )
    def test_a_class_of_the_base_that_is_not_there(self, mapping: Any, tmp_path: Path) -> None:
        config = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "auto_mapping": mapping}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="base's class"):
            AutoPeftModel.from_pretrained(tmp_path)

    def test_a_second_wrapper_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="PeftModel already"):
            get_peft_model(wrapped(), LoraConfig(r=2, target_modules=["down"]), "other")
        wrapped().save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"PeftModel already; model\.load_adapter"):
            PeftModel.from_pretrained(wrapped(), tmp_path, "other")
        with pytest.raises(ConfigError, match="mixed=True"):
            get_peft_model(toy(), LoraConfig(), mixed=True)


def transformer_adapter(folder: Path) -> Path:
    base = transformer("bert-classifier")
    base.name_or_path = "somebody/base"
    get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS")).save_pretrained(folder)
    return folder


class TestSaving:
    def test_while_merged(self, tmp_path: Path) -> None:
        model = wrapped(modules_to_save=["head"])
        before = outputs(model)
        model.merge_adapter()
        merged = outputs(model)
        model.save_pretrained(tmp_path)
        assert model.get_nb_trainable_parameters()[0] > 0
        torch.testing.assert_close(outputs(model), merged, rtol=0, atol=0)
        torch.testing.assert_close(outputs(PeftModel.from_pretrained(toy(), tmp_path)), before)
        model.unmerge_adapter()
        torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)

    @pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
    def test_merged_weights_do_not_go_beside_the_adapter(self, how: str, tmp_path: Path) -> None:
        transformer_adapter(tmp_path)
        model = PeftModel.from_pretrained(transformer("bert-classifier"), tmp_path)
        base: Any = model.get_base_model()
        getattr(model, how)()
        with pytest.raises(FileError, match="count twice"):
            base.save_pretrained(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
        base.save_pretrained(tmp_path / "merged")
        again = type(base).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(answers(again), answers(base.eval()), rtol=0, atol=0)

    def test_embeddings_when_asked_for(self, tmp_path: Path) -> None:
        base = transformer("bert-classifier")
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"]))
        base.get_input_embeddings().weight.data += 1
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        again = PeftModel.from_pretrained(transformer("bert-classifier"), tmp_path)
        table = again.get_base_model().get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(table.detach(), base.get_input_embeddings().weight.detach())
        with pytest.raises(ConfigError, match="save_embedding_layers"):
            model.save_pretrained(tmp_path, save_embedding_layers="always")

    def test_embeddings_that_were_resized(self, tmp_path: Path) -> None:
        """Of a base whose classes transformers does not know by name."""
        made: Any = transformer("llama")
        Config = type("OwnConfig", (type(made.config),), {"model_type": "own"})
        Model: Any = type("OwnModel", (type(made),), {"config_class": Config})
        Model(Config(**{**made.config.to_dict(), "model_type": "own"})).save_pretrained(tmp_path / "base")
        fields = json.loads((tmp_path / "base" / "config.json").read_text())
        fields["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
        (tmp_path / "base" / "config.json").write_text(json.dumps(fields))
        for rows in (made.config.vocab_size, 48):
            base = Model.from_pretrained(tmp_path / "base")
            base.resize_token_embeddings(rows, mean_resizing=False)
            model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
            model.save_pretrained(tmp_path / "out")
            tables = [key for key in load_peft_weights(tmp_path / "out") if "lora_" not in key]
            assert bool(tables) is (rows == 48)
        (tmp_path / "base" / "config.json").write_text("{")
        with pytest.warns(LoricaWarning, match="cannot be read .*so it is not known whether the vocabulary"):
            model.save_pretrained(tmp_path / "out")
        shutil.rmtree(tmp_path / "base")
        model.save_pretrained(tmp_path / "out")

    @pytest.mark.parametrize("rooted", [False, True])
    def test_on_the_untouched_base(self, rooted: bool, tmp_path: Path) -> None:
        settings = {"use_rslora": rooted, "rank_pattern": {"0.up": 3}, "alpha_pattern": {"1.up": 5}}
        model = wrapped(**settings)
        start = lorica.extract(model, "default")
        start = {path: (f.scale * f.B @ f.A).clone() for path, f in start.factors.items()}
        model.save_pretrained(tmp_path / "start")
        shake(model, 7)
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "start")
        found = lorica.read(tmp_path / "out").factors
        trained = lorica.extract(model, "default").factors
        for path, f in found.items():
            assert f.r == 2 * trained[path].r
            expected = trained[path].scale * trained[path].B @ trained[path].A - start[path]
            torch.testing.assert_close(f.scale * f.B @ f.A, expected)
        with pytest.raises(AdapterError, match="is not how this adapter started"):
            wrapped(r=5).save_pretrained(
                tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path / "start"
            )

    def test_pickles_and_copies(self) -> None:
        model = wrapped()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin) is PeftModel
            torch.testing.assert_close(outputs(twin), outputs(model))

    def test_what_means_nothing_is_refused_before_anything_is_written(self, tmp_path: Path) -> None:
        model = wrapped()
        with pytest.raises(ConfigError, match="max_shard_size"):
            model.save_pretrained(tmp_path / "out", max_shard_size="1GB")
        with pytest.raises(AdapterError, match="no adapter is named 'other'"):
            model.save_pretrained(tmp_path / "out", selected_adapters=["default", "other"])
        with pytest.raises(ConfigError, match="a list of names, not one string 'default'"):
            model.save_pretrained(tmp_path / "out", selected_adapters="default")
        assert not (tmp_path / "out").exists()
        model.save_pretrained(tmp_path / "out", save_function=torch.save)


class TestGathered:
    """Values from a state dict, as accelerate's scripts and sharded training give them."""

    def test_of_the_whole_model(self, tmp_path: Path) -> None:
        model = wrapped(modules_to_save=["head"], bias="lora_only")
        model.add_adapter("frozen", LoraConfig(r=2, target_modules=["down"]))
        given = {key: 2 * value for key, value in model.state_dict().items()}
        for before in ("", "module.", "_orig_mod.", "module._orig_mod."):
            model.save_pretrained(tmp_path, state_dict={before + key: value for key, value in given.items()})
            found = load_peft_weights(tmp_path)
            for key, value in lorica.peft.get_peft_model_state_dict(model).items():
                assert torch.equal(found[key], 2 * value)
            assert load_peft_weights(tmp_path / "frozen")

    def test_of_what_trains_alone(self, tmp_path: Path) -> None:
        model = wrapped()
        model.add_adapter("frozen", LoraConfig(r=2, target_modules=["down"]))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B.default" in name)
        given = {name: 3 * p.detach() for name, p in model.named_parameters() if p.requires_grad}
        model.save_pretrained(tmp_path, state_dict=given)
        found = load_peft_weights(tmp_path)
        for key, value in lorica.peft.get_peft_model_state_dict(model).items():
            assert torch.equal(found[key], (3 if "lora_B" in key else 1) * value)

    def test_what_is_not_the_adapters_is_refused(self, tmp_path: Path) -> None:
        model = wrapped()
        given = model.state_dict()
        first, second, *_ = (key for key in given if "lora_A" in key)
        for wrong, said in (
            ({f"other.{key}": value for key, value in given.items()}, "missing: blocks.0.up.lora_A"),
            ({key: value for key, value in given.items() if key != second}, "missing: blocks.1.up.lora_A"),
            ({**given, first: given[first][:1]}, r"shape of blocks\.0\.up\.lora_A.*\(1, 6\), .* \(2, 6\)"),
            ({}, "and has nothing"),
        ):
            with pytest.raises(AdapterError, match=said):
                model.save_pretrained(tmp_path / "out", state_dict=wrong)
        model.requires_grad_(False)
        with pytest.raises(AdapterError, match="missing"):
            model.save_pretrained(tmp_path / "out", state_dict={f"other.{key}": given[key] for key in given})
        assert not (tmp_path / "out").exists()
