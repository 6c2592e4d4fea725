"""The names of an adapter's classes: they come with its head, and go with it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

import lorica
from lorica import algebra
from lorica.errors import AdapterError, FileError

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


def named(prefix: str) -> dict[int, str]:
    return {place: f"{prefix}{place}" for place in range(3)}


def shown(of: Any) -> str:
    """Whose names the configuration holds, told by their first letter; both ways agree."""
    names = [of.config.id2label[place] for place in range(3)]
    assert of.config.label2id == {name: place for place, name in enumerate(names)}
    return names[0][0]


@pytest.fixture
def several(tmp_path: Path) -> BertForSequenceClassification:
    """Adapters a and b with heads of their own, c without one, n whose head has no names; base: x."""
    of = model(named("x"))
    for name in "ab":
        lorica.load(of, saved(tmp_path / name, names=named(name)), name)
    lorica.load(of, saved(tmp_path / "c", None), "c")
    lorica.load(of, saved(tmp_path / "n", names=None), "n")
    return of


def test_the_names_are_the_acting_heads(several: Any) -> None:
    assert shown(several) == "a"
    for name, expected in {"b": "b", "c": "x", "a": "a", "n": "x"}.items():
        lorica.active(several, name)
        assert shown(several) == expected
        with lorica.disabled(several):
            assert shown(several) == "x"
        assert shown(several) == expected
        with lorica.active(several, ["c", "b"]):
            assert shown(several) == "b"
        with lorica.mixed(several, ["a", "b"]):
            assert shown(several) == "x"
        with lorica.mixed(several, ["a", "a"]):
            assert shown(several) == "a"
        assert shown(several) == expected
        assert [names and names[0][0] for names in (lorica.extract(several, n).classes for n in "abcn")] == [
            *("a", "b", None, "x")
        ]


def test_merged_switched_and_restored_they_follow(several: Any, tmp_path: Path) -> None:
    lorica.merge(several, "b")
    assert shown(several) == "b"
    several.save_pretrained(tmp_path / "merged")
    assert BertConfig.from_pretrained(tmp_path / "merged").id2label == named("b")
    lorica.switch(several, "a")
    assert shown(several) == "a"
    lorica.switch(several, "c")
    assert shown(several) == "x"
    lorica.restore(several)
    assert shown(several) == "a"
    lorica.detach(several, "a")
    lorica.active(several, "b")
    lorica.detach(several, "b")
    assert shown(several) == "x"
    lorica.detach(several)
    assert shown(several) == "x"


def test_names_that_are_given_while_a_head_acts_are_that_heads(several: Any, tmp_path: Path) -> None:
    config = lorica.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    lorica.adapt(several, config, "new")
    assert shown(several) == "x"
    several.config.id2label = named("y")
    several.config.label2id = {name: place for place, name in named("y").items()}
    lorica.active(several, "a")
    assert shown(several) == "a"
    lorica.active(several, "new")
    assert shown(several) == "y"
    assert lorica.extract(several, "new").classes == tuple(named("y").values())
    lorica.load_weights(several, tmp_path / "b", "new")
    assert shown(several) == "b"
    lorica.active(several, "c")
    lorica.load_weights(several, tmp_path / "a", "new")
    assert shown(several) == "x"
    lorica.active(several, "new")
    assert shown(several) == "a"


def test_adapters_made_from_others_have_them_too(several: Any) -> None:
    one, other, bare, nameless = (lorica.extract(several, name) for name in "abcn")
    head = tuple(named("a").values())
    assert algebra.compress(one, rank=1)[0].classes == head
    assert algebra.scale(one, 2.0).classes == head
    assert algebra.combine([one, other], keep=0).classes == head
    assert algebra.combine([other, one], keep=1, method="linear").classes == head
    assert algebra.add(one, bare).classes == head
    assert algebra.subtract(bare, one).classes == head
    same = dataclasses.replace(other, extras=one.extras)
    with pytest.raises(AdapterError, match=r"names of the classes: a0, a1, a2 and b0"):
        algebra.add(one, same)
    assert algebra.add(one, same, keep=1).classes == tuple(named("b").values())
    assert algebra.add(one, dataclasses.replace(nameless, extras=one.extras, classes=None)).classes == head
