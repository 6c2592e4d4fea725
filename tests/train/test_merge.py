from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import lorica
from lorica import LoraConfig
from lorica.cli import main
from lorica.errors import ConfigError, FileError
from lorica.train import Recipe, predict, train
from lorica.train.merge import merge_checkpoint


@pytest.fixture
def run(make_recipe: Callable[..., Recipe]) -> Recipe:
    recipe = make_recipe()
    train(recipe)
    return recipe


def test_a_merged_checkpoint_stands_alone(run: Recipe, tmp_path: Path) -> None:
    report, out = merge_checkpoint(run.model, run.output, tmp_path / "merged")
    assert report.worst[1] < 1e-3
    model, loading = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.config.id2label == {0: "bad", 1: "good"}
    texts = ["lovely great film", "awful plot"]
    for merged, adapted in zip(predict(out, texts), predict(run.output, texts), strict=True):
        assert merged["probabilities"] == pytest.approx(adapted["probabilities"], abs=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_merged_checkpoint_pads_with_the_adapters_token(run: Recipe, tmp_path: Path) -> None:
    (Path(run.output) / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[UNK]"})
    )
    _, out = merge_checkpoint(run.model, run.output, tmp_path / "merged")
    assert main(["merge", run.model, run.output, "--output", str(tmp_path / "streamed"), "--stream"]) == 0
    for folder in (out, tmp_path / "streamed"):
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 1


def test_an_adapter_without_a_recipe_brings_its_own_head(run: Recipe, tmp_path: Path) -> None:
    (Path(run.output) / "recipe.yaml").unlink()
    (Path(run.output) / "tokenizer_config.json").unlink()
    _, out = merge_checkpoint(run.model, run.output, tmp_path / "merged", dtype="bfloat16")
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.num_labels == 2
    assert model.dtype == torch.bfloat16
    assert (out / "tokenizer.json").is_file()


def test_an_adapter_of_unknown_task_follows_its_base(tiny_model: Path, tmp_path: Path) -> None:
    model = lorica.adapt(
        AutoModel.from_pretrained(tiny_model),
        LoraConfig(r=2, target_modules=["query"], init_lora_weights=False),
    )
    lorica.save(model, tmp_path / "adapter")
    _, out = merge_checkpoint(str(tiny_model), tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertModel"]


def test_refusals_leave_nothing(run: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is there already and not empty"):
        merge_checkpoint(run.model, run.output, run.output)
    with pytest.raises(ConfigError, match="dtype must be auto"):
        merge_checkpoint(run.model, run.output, tmp_path / "merged", dtype="float17")
    with pytest.raises(FileError, match="cannot load the base 'nobody/nothing'"):
        merge_checkpoint("nobody/nothing", run.output, tmp_path / "merged")
    with pytest.raises(FileError):
        merge_checkpoint(run.model, tmp_path / "nowhere", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_failed_write_leaves_nothing(run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="disk full"):
        merge_checkpoint(run.model, run.output, tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_base_of_unknown_architecture(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": None}))
    model = lorica.adapt(AutoModel.from_pretrained(tiny_model), LoraConfig(r=2, target_modules=["query"]))
    lorica.save(model, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="set task_type"):
        merge_checkpoint(str(base), tmp_path / "adapter", tmp_path / "merged")
