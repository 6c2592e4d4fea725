"""PEFT and lorica on the same quantized base: the same logits, and files that cross both ways."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import quantized
from tiny import batch, shake, transformer
from torch import Tensor, nn

import lorica

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = ["nf4", "fp4", "int8"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def build(kind: str) -> Any:
    """A small Llama with packed projections; the same each time."""
    model = transformer("llama", hidden_size=64, intermediate_size=128)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, quantized(child, kind))
    # In training bitsandbytes unpacks on the CPU; in evaluation it would round the input of int8 as well.
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return model.train()


def logits(model: nn.Module) -> Tensor:
    return model(**batch("llama")).logits


def agree(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_files_cross_both_ways(kind: str, use_dora: bool, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(kind), peft.LoraConfig(**SETTINGS, use_dora=use_dora))
    shake(theirs, size=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs)
    assert not torch.allclose(expected, logits(build(kind)), atol=1e-3)
    agree(logits(lorica.load(build(kind), tmp_path / "theirs", trainable=True)), expected)

    ours = lorica.adapt(build(kind), lorica.LoraConfig(**SETTINGS, use_dora=use_dora))
    shake(ours, seed=1, size=0.2)
    lorica.save(ours, tmp_path / "ours")
    agree(logits(peft.PeftModel.from_pretrained(build(kind), tmp_path / "ours").train()), logits(ours))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree(kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(kind), peft.LoraConfig(**SETTINGS))
    shake(theirs, size=0.2)
    theirs.save_pretrained(tmp_path)
    ours = lorica.load(build(kind), tmp_path, trainable=True)
    gradients = []
    for model in (theirs, ours):
        logits(model).square().sum().backward()
        gradients.append(
            {
                n.removeprefix("base_model.model."): p.grad
                for n, p in model.named_parameters()
                if p.requires_grad
            }
        )
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_packed_weights(kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(kind), peft.LoraConfig(**SETTINGS))
    shake(theirs, size=0.2)
    theirs.save_pretrained(tmp_path)
    ours = lorica.load(build(kind), tmp_path)
    exact = logits(ours)
    lorica.merge(ours, into="quantized")
    merged = theirs.merge_and_unload()
    off = [(logits(model) - exact).norm() for model in (ours, merged)]
    assert off[0] < 1.1 * off[1]  # they round what is packed twice
    torch.testing.assert_close(logits(ours), logits(merged), rtol=0.1, atol=0.05)


def test_counts_agree() -> None:
    theirs = peft.get_peft_model(build("nf4"), peft.LoraConfig(**SETTINGS))
    ours = lorica.trainable_parameters(lorica.adapt(build("nf4"), lorica.LoraConfig(**SETTINGS)))
    assert theirs.get_nb_trainable_parameters() == (ours.trainable, ours.total)
