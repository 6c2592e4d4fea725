"""Adapters of a model to disk and back, also by transformers' own `save_pretrained`."""

from __future__ import annotations

import copy
import json
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import Toy, adapted, bits, outputs, record, shake, transformer

import lorica
from lorica.errors import AdapterError, ConfigError, FileError, StateError

CONFIG = lorica.LoraConfig(r=2, target_modules=["up", "embed"], modules_to_save=["head"], bias="all")
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def fresh() -> Toy:
    torch.manual_seed(0)
    return Toy()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


class TestSaveAndLoad:
    """`save`, `load`, `load_weights`."""

    def test_a_fresh_model_computes_the_same(self, tmp_path: Path) -> None:
        model = adapted(fresh(), CONFIG)
        assert lorica.save(model, tmp_path / "a") == tmp_path / "a"
        assert files(tmp_path / "a") == FILES
        other = fresh()
        assert lorica.load(other, str(tmp_path / "a"), "mine") is other
        assert list(lorica.adapters(other)) == ["mine"]
        assert bits(outputs(other)) == bits(outputs(model))
        assert lorica.trainable_parameters(other).trainable == 0

    def test_trained_on_from_a_file(self, tmp_path: Path) -> None:
        model = adapted(fresh(), CONFIG)
        other = lorica.load(fresh(), lorica.save(model, tmp_path), trainable=True)
        assert lorica.trainable_parameters(other).trainable == lorica.trainable_parameters(model).trainable
        shake(other, seed=4)
        shake(model, seed=4)
        assert {bits(t) for t in lorica.extract(other).named_tensors().values()} == {
            bits(t) for t in lorica.extract(model).named_tensors().values()
        }

    def test_the_base_is_named_in_the_file(self, tmp_path: Path) -> None:
        model = transformer("bert")
        model.config._name_or_path = model.name_or_path = "someone/base"
        lorica.save(lorica.adapt(model, lorica.LoraConfig(r=2)), tmp_path)
        data = json.loads((tmp_path / "adapter_config.json").read_text())
        assert data["base_model_name_or_path"] == "someone/base"
        assert data["target_modules"] == ["query", "value"]

    @pytest.mark.usefixtures("no_network")
    def test_saving_touches_no_network(self, tmp_path: Path) -> None:
        model = transformer("bert")
        model.name_or_path = "someone/base"
        lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["query", "word_embeddings"]))
        lorica.save(model, tmp_path / "a")
        model.save_pretrained(tmp_path / "b")
        assert files(tmp_path / "a") == files(tmp_path / "b") == FILES

    def test_which_adapter_must_be_clear(self, tmp_path: Path) -> None:
        model = adapted(adapted(fresh(), CONFIG, "a"), CONFIG, "b")
        lorica.disabled(model)
        with pytest.raises(AdapterError, match="which adapter"):
            lorica.save(model, tmp_path / "x")
        assert not (tmp_path / "x").exists()

    def test_what_cannot_be_saved_leaves_the_old_files(self, tmp_path: Path) -> None:
        model = adapted(fresh(), CONFIG)
        lorica.save(model, tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        lorica.merge(model)
        with pytest.raises(StateError, match="is merged"):
            lorica.save(model, tmp_path)
        lorica.restore(model)
        lorica.extract(model).extras["norm.bias"][0] = float("inf")
        with pytest.raises(AdapterError, match=r"norm\.bias"):
            lorica.save(model, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_what_cannot_be_loaded_leaves_the_model(self, tmp_path: Path) -> None:
        model = adapted(fresh(), CONFIG, "first")
        lorica.save(model, tmp_path)
        before = record(model)
        with pytest.raises(FileError):
            lorica.load(model, tmp_path / "missing", "second")
        with pytest.raises(AdapterError, match="already has"):
            lorica.load(model, tmp_path, "first")
        with pytest.raises(AdapterError, match="letters, digits"):
            lorica.load(model, tmp_path, "../second")
        weights = tmp_path / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])
        with pytest.raises(FileError, match="truncated or damaged"):
            lorica.load(model, tmp_path, "second")
        with pytest.raises(FileError, match="truncated or damaged"):
            lorica.load_weights(model, tmp_path)
        assert record(model) == before

    def test_weights_alone_keep_everything_else(self, tmp_path: Path) -> None:
        saved = adapted(fresh(), CONFIG, seed=1)
        lorica.save(saved, tmp_path)
        model = adapted(fresh(), CONFIG).train()
        before = record(model)
        lorica.load_weights(model, tmp_path)
        assert record(model)._replace(values=[]) == before._replace(values=[])
        assert model.training
        assert bits(outputs(model.eval())) == bits(outputs(saved.eval()))

    def test_weights_of_another_make_are_refused(self, tmp_path: Path) -> None:
        lorica.save(adapted(fresh(), CONFIG.replace(r=3)), tmp_path)
        model = adapted(fresh(), CONFIG)
        before = record(model)
        with pytest.raises(
            AdapterError, match=r"shape of embed \(A\): \(3, 40\) in the adapter, \(2, 40\) on the model"
        ):
            lorica.load_weights(model, tmp_path)
        assert record(model) == before


class TestSavePretrained:
    """transformers' own way to save, while the model carries adapters."""

    CONFIG = lorica.LoraConfig(r=2, task_type="SEQ_CLS", bias="lora_only")

    def model(self, *names: str) -> Any:
        model = transformer("bert-classifier")
        for seed, name in enumerate(names):
            adapted(model, self.CONFIG, name, seed)
        return model

    def check(self, model: Any, name: str, folder: Path) -> None:
        lorica.active(model, name)
        expected = outputs(model)
        assert bits(outputs(lorica.load(transformer("bert-classifier"), folder))) == bits(expected)

    @pytest.mark.parametrize("name", ["default", "sentiment"])
    def test_one_adapter_goes_into_the_folder_itself(self, name: str, tmp_path: Path) -> None:
        model = self.model(name)
        model.save_pretrained(str(tmp_path))
        assert files(tmp_path) == FILES
        self.check(model, name, tmp_path)

    def test_several_go_into_folders_of_their_names(self, tmp_path: Path) -> None:
        model = self.model("default", "a", "b")
        model.save_pretrained(tmp_path)
        assert files(tmp_path) == FILES | {f"{name}/{file}" for name in "ab" for file in FILES}
        for name, folder in (("default", tmp_path), ("a", tmp_path / "a"), ("b", tmp_path / "b")):
            self.check(model, name, folder)

    def test_no_adapter_need_be_called_default(self, tmp_path: Path) -> None:
        self.model("a", "b").save_pretrained(tmp_path)
        assert files(tmp_path) == {f"{name}/{file}" for name in "ab" for file in FILES}

    def test_another_process_writes_nothing(self, tmp_path: Path) -> None:
        self.model("default").save_pretrained(tmp_path / "x", is_main_process=False)
        assert not (tmp_path / "x").exists()

    def test_values_come_from_a_given_state(self, tmp_path: Path) -> None:
        model = self.model("default")
        gathered = {name: torch.full_like(t, 5.0) for name, t in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=gathered)
        written = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
        assert set(written) == {
            *(
                f"base_model.model.bert.encoder.layer.{i}.attention.self.{module}.{leaf}"
                for i in range(2)
                for module in ("query", "value")
                for leaf in ("lora_A.weight", "lora_B.weight", "base_layer.bias")
            ),
            "base_model.model.classifier.weight",
            "base_model.model.classifier.bias",
        }
        assert all(bool((tensor == 5).all()) for tensor in written.values())

    def test_arguments_of_full_weights_mean_nothing(self, tmp_path: Path) -> None:
        self.model("default").save_pretrained(tmp_path, max_shard_size="1KB", safe_serialization=True)
        assert files(tmp_path) == FILES

    def test_what_is_not_done_is_said(self, tmp_path: Path) -> None:
        model = self.model("default")
        with pytest.raises(ConfigError, match="push_to_hub"):
            model.save_pretrained(tmp_path, push_to_hub=True)
        with pytest.raises(ConfigError, match="safetensors only"):
            model.save_pretrained(tmp_path, safe_serialization=False)
        assert files(tmp_path) == set()

    @pytest.mark.parametrize("how", ["merge", "detach"])
    def test_merged_or_detached_the_model_saves_itself(self, how: str, tmp_path: Path) -> None:
        model = self.model("default")
        getattr(lorica, how)(model)
        model.save_pretrained(tmp_path)
        assert "model.safetensors" in files(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert bits(outputs(again)) == bits(outputs(model))
        if how == "merge":
            lorica.restore(model)
            model.save_pretrained(tmp_path / "adapter")
            assert files(tmp_path / "adapter") == FILES

    def test_merged_it_is_not_saved_beside_an_adapter(self, tmp_path: Path) -> None:
        """transformers would load the adapter on top of weights that have it already."""
        model = self.model("default")
        model.save_pretrained(tmp_path)
        lorica.merge(model)
        for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.raises(FileError, match="count twice"):
                each.save_pretrained(save_directory=str(tmp_path))
        assert files(tmp_path) == FILES
        model.save_pretrained(tmp_path / "merged")
        again = type(model).from_pretrained(tmp_path / "merged").eval()
        assert bits(outputs(again)) == bits(outputs(model))
        lorica.restore(model).save_pretrained(tmp_path)
        assert files(tmp_path) >= FILES
        lorica.detach(model)
        model.save_pretrained(tmp_path)  # the base beside its adapter loads right

    def test_the_class_keeps_its_name(self) -> None:
        transformers = pytest.importorskip("transformers")
        model = self.model("default")
        assert type(model).__name__ == model._get_name() == "BertForSequenceClassification"
        assert isinstance(model, transformers.BertForSequenceClassification)
