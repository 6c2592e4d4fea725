"""Recipes on a quantized base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import NEEDED
from torch import nn

from lorica.errors import ConfigError, MissingExtra
from lorica.layers.quantized import quantizer_of
from lorica.train import Recipe, evaluate, predict, prepare, train
from lorica.train.merge import merge_checkpoint
from lorica.train.trained import open_run

kinds = pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])


def packed(model: nn.Module) -> set[str]:
    """Last names of the layers whose weight is packed."""
    return {
        name.rpartition(".")[2] for name, module in model.named_modules() if quantizer_of(module) is not None
    }


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    pytest.importorskip("bitsandbytes", reason=NEEDED)
    made = make_recipe(epochs=15, load_best=False, learning_rate=3e-3)
    return made.replace(method={"r": 8, "lora_alpha": 16, "lora_dropout": 0.0})


@kinds
def test_from_the_recipe_to_predictions(kind: str, recipe: Recipe, tmp_path: Path) -> None:
    out = train(recipe.replace(quantization=kind)).output
    assert Recipe.load(out / "recipe.yaml").quantization == kind
    assert packed(open_run(out).model) == {"query", "key", "value", "dense"}
    scores = evaluate(out)
    assert scores["accuracy"] >= 0.9
    assert predict(out, ["lovely film"])[0]["label"] == "good"
    report, merged = merge_checkpoint(recipe.model, out, tmp_path / "merged")
    assert report.worst[1] < 1e-5  # on disk it goes into the original weights
    assert packed(open_run(merged).model) == set()
    assert evaluate(merged)["accuracy"] >= 0.9


def test_products_are_taken_in_the_dtype_of_training(recipe: Recipe) -> None:
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        prepared = prepare(recipe.replace(quantization="nf4", training={"bf16": bf16}))
        layer: Any = prepared.model.get_submodule("bert.encoder.layer.0.attention.self.query")
        assert layer.compute_dtype == dtype
        assert type(prepared.model.get_submodule("classifier")) is nn.Linear


def test_one_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="quantization must be None or one of"):
        Recipe(quantization="int3")


def test_without_bitsandbytes(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    recipe = make_recipe().replace(quantization="nf4")
    with pytest.raises(MissingExtra, match=r"bitsandbytes is not installed.*lorica\[quantized\]"):
        train(recipe)
    assert not (Path(recipe.output) / "adapter_config.json").exists()
