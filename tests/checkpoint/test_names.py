"""Modules called as parts of PEFT's own are: each round trip, and PEFT reading it where it reads its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.checkpoint import peft as files
from lorica.errors import AdapterError

NAMES = (
    *("original_module", "base_layer", "modules_to_save", "token_adapter", "default", "module", "weight"),
    *("bias", "added", "lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "lora_diag"),
)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "two": {"target_modules": ["{leaf}", "before"]},
    "biases": {"bias": "all"},
    "dora": {"use_dora": True},
    "whole": {"target_modules": ["head"], "modules_to_save": ["{name}"]},
}


class Named(nn.Module):
    """A model with a part of some name, which is a layer or holds one."""

    def __init__(self, name: str, *, deep: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Linear(6, 6)
        self.before = nn.Linear(6, 6)
        self.part = nn.Module()
        self.part.add_module(name, nn.Sequential(inner) if deep else inner)
        self.head = nn.Linear(6, 3)
        self._name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.part.get_submodule(self._name)(torch.relu(self.before(x)))))


def settings(name: str, kind: str, *, deep: bool) -> dict[str, Any]:
    leaf = "0" if deep else name
    given = {"r": 2, "target_modules": ["{leaf}"], "init_lora_weights": False, **KINDS[kind]}
    return {
        field: [each.format(leaf=leaf, name=name) for each in value] if isinstance(value, list) else value
        for field, value in given.items()
    }


def trained(name: str, kind: str, *, deep: bool) -> nn.Module:
    model = lorica.adapt(Named(name, deep=deep), lorica.LoraConfig(**settings(name, kind, deep=deep)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def peft_reads(folder: Path, name: str, kind: str, *, deep: bool, x: Tensor) -> Tensor | None:
    """What PEFT computes with a folder; None where it cannot read an adapter of its own here."""
    if (name, kind) == ("base_layer", "whole"):
        return None  # which means to PEFT what its own layers are put around
    peft: Any = pytest.importorskip("peft")
    own = folder.with_name("own")
    try:
        made = peft.get_peft_model(Named(name, deep=deep), peft.LoraConfig(**settings(name, kind, deep=deep)))
        made.save_pretrained(own)
        again = peft.PeftModel.from_pretrained(Named(name, deep=deep), own)
        if not torch.allclose(again(x), made(x), atol=1e-6):
            return None
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
        return None
    return peft.PeftModel.from_pretrained(Named(name, deep=deep), folder)(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("deep", [False, True], ids=["layer", "holder"])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_comes_back(name: str, deep: bool, tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    for kind in KINDS:
        folder = tmp_path / kind / "ours"
        model = trained(name, kind, deep=deep)
        expected = model(x)
        lorica.save(model, folder)
        loaded = lorica.load(Named(name, deep=deep), folder)
        torch.testing.assert_close(loaded(x), expected, msg=kind)
        over = lorica.adapt(Named(name, deep=deep), lorica.LoraConfig(**settings(name, kind, deep=deep)))
        lorica.load_weights(over, folder)
        torch.testing.assert_close(over(x), expected, msg=kind)
        assert lorica.extract(loaded).named_tensors().keys() == lorica.extract(model).named_tensors().keys()
        if (theirs := peft_reads(folder, name, kind, deep=deep, x=x)) is not None:
            torch.testing.assert_close(theirs, expected, msg=f"PEFT, {kind}")


@pytest.mark.parametrize("name", ["base_layer", "original_module", "lora_A"])
def test_a_pickle_cannot_tell_and_is_refused(name: str, tmp_path: Path) -> None:
    adapter = lorica.extract(trained(name, "lora", deep=True))
    with pytest.raises(AdapterError, match=rf"part\.{name}\.0.*write safetensors"):
        files.write(adapter, tmp_path, pickled=True)
    assert not list(tmp_path.iterdir())


def test_names_that_nobody_takes_for_others_have_no_marks(tmp_path: Path) -> None:
    lorica.save(trained("lora_Alpha", "lora", deep=True), tmp_path)
    assert files.read_marks(tmp_path) == {}
    files.write(lorica.read(tmp_path), tmp_path / "pickled", pickled=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["original_module", "default", "lora_A"])
def test_what_peft_wrote_of_such_a_module_is_read(name: str, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    x = torch.randn(4, 6)
    for kind in ("lora", "biases", "dora"):
        given = peft.LoraConfig(**settings(name, kind, deep=True))
        theirs = peft.get_peft_model(Named(name, deep=True), given)
        theirs.save_pretrained(tmp_path / kind)
        torch.testing.assert_close(lorica.load(Named(name, deep=True), tmp_path / kind)(x), theirs(x))
