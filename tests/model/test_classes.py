"""The names of an adapter's classes: they come with its head, and go with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

import lorica
from lorica.errors import FileError

NAMES = {0: "negative", 1: "neutral", 2: "positive"}


def model(names: dict[int, str] | None = None) -> BertForSequenceClassification:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
    }
    named: dict[str, Any] = {"num_labels": 3}
    if names is not None:
        named = {"id2label": names, "label2id": {name: place for place, name in names.items()}}
    return BertForSequenceClassification(BertConfig(**small, **named, num_attention_heads=2))


def saved(folder: Path, task_type: str | None = "SEQ_CLS", names: dict[int, str] | None = NAMES) -> Path:
    config = lorica.LoraConfig(r=2, target_modules=["query"], task_type=task_type)
    return lorica.save(lorica.adapt(model(names), config), folder)


def test_they_come_with_the_head_and_go_with_it(tmp_path: Path) -> None:
    other = model()
    before = copy.deepcopy((other.config.id2label, other.config.label2id))
    lorica.load(other, saved(tmp_path / "a"))
    assert other.config.id2label == NAMES
    assert other.config.label2id == {"negative": 0, "neutral": 1, "positive": 2}
    assert lorica.extract(other).classes == tuple(NAMES.values())
    lorica.detach(other)
    assert (other.config.id2label, other.config.label2id) == before
    assert lorica.read(tmp_path / "a").classes == tuple(NAMES.values())


def test_without_a_head_or_names_nothing_changes(tmp_path: Path) -> None:
    for folder, task_type, names in (("no head", None, NAMES), ("no names", "SEQ_CLS", None)):
        path = saved(tmp_path / folder, task_type, names)
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            assert "lorica_classes" not in file.metadata()
        own = {0: "a", 1: "b", 2: "c"}
        assert lorica.load(model(own), path).config.id2label == own


def test_damaged_names(tmp_path: Path) -> None:
    file = saved(tmp_path / "a") / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "lorica_classes": '{"a": 1}'})
    with pytest.raises(FileError, match="lorica_classes in it is no list of names"):
        lorica.read(tmp_path / "a")
