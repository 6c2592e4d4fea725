from __future__ import annotations

import dataclasses
import inspect
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import transformer
from torch import nn
from transformers import BertForSequenceClassification

import lorica
from lorica import methods
from lorica.errors import ConfigError, LoricaError
from lorica.train import Recipe, Record, TrainingConfig, tasks, train
from lorica.train.trainer.arguments import (
    MOST_PASSES,
    chosen_defaults,
    learning_rate_for,
    passes,
    with_defaults,
)


def wide(width: int) -> nn.Module:
    model = nn.Linear(2, 2)
    model.config = type("Config", (), {"hidden_size": width})()  # type: ignore[assignment]
    return model


def adapted(width: int, config: Any = None) -> nn.Module:
    # Llama has no biases.
    model: Any = transformer("bert" if isinstance(config, methods.BitFitConfig) else "llama")
    lorica.adapt(model, config or lorica.LoraConfig(r=2, target_modules=["q_proj"]))
    model.config.hidden_size = width
    return model


def test_the_rate_falls_with_the_width() -> None:
    rates = [learning_rate_for(adapted(width)) for width in (384, 768, 2000, 4096, 12288)]
    assert rates == [1.0e-3, 7.5e-4, 5.0e-4, 3.7e-4, 2.3e-4]


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        (methods.FullConfig(), 0.1),
        (methods.BitFitConfig(), 3.0),
        (methods.AdapterHConfig(bottleneck=2), 2.0),
        ([lorica.LoraConfig(r=2, target_modules=["q_proj"]), methods.PreLayerConfig(prefix=2)], 1.0),
    ],
)
def test_each_method_has_its_factor(config: Any, factor: float) -> None:
    assert learning_rate_for(adapted(2000, config)) == pytest.approx(5e-4 * factor)


def test_what_carries_no_adapter_is_trained_whole() -> None:
    assert learning_rate_for(wide(2000)) == pytest.approx(5e-5)
    assert learning_rate_for(nn.Linear(2, 2)) == pytest.approx(5e-5)


@pytest.mark.parametrize("rows", [1, 16, 200, 400, 800, 2490, 3668, 8551])
def test_few_rows_get_more_passes(rows: int) -> None:
    training = TrainingConfig()
    found = passes(rows, training, 600)
    assert 3 <= found <= MOST_PASSES
    steps = found * math.ceil(rows / 16)
    assert steps >= 600 or found == MOST_PASSES
    assert found == 3 or steps < 600 + math.ceil(rows / 16) or found == MOST_PASSES


def test_a_batch_that_is_gathered_counts_as_one_step() -> None:
    one = passes(400, TrainingConfig(batch_size=32), 600)
    assert one == passes(400, TrainingConfig(batch_size=8, gradient_accumulation=4), 600)


def test_a_users_values_win() -> None:
    given = TrainingConfig(learning_rate=0.3, epochs=1.5)
    task = tasks.get("sequence-classification")
    given = dataclasses.replace(given, group_by_length=False)
    assert with_defaults(given, 10, wide(8), task) == given
    steps = with_defaults(TrainingConfig(max_steps=7), 10, wide(8), task)
    assert (steps.max_steps, steps.group_by_length) == (7, True)
    assert set(chosen_defaults(TrainingConfig(max_steps=7), steps)) == {"learning_rate", "group_by_length"}


def test_a_run_keeps_what_was_chosen(make_recipe: Callable[..., Recipe], capsys: Any) -> None:
    recipe = make_recipe(learning_rate=None, max_steps=2)
    result = train(recipe)
    record = json.loads((result.output / "run.json").read_text())
    rate = record["recipe"]["training"]["learning_rate"]
    assert record["results"]["chosen"] == {"learning_rate": rate, "group_by_length": True}
    assert record["recipe"]["training"]["group_by_length"] is True
    assert Recipe.load(result.output / "recipe.yaml").training.learning_rate == result.chosen["learning_rate"]
    assert f"chosen: learning rate {result.chosen['learning_rate']:g}" in capsys.readouterr().out
    assert train(recipe, resume=True).metrics == result.metrics


def test_a_run_goes_on_in_the_order_of_rows_that_it_began_in(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    begun = make_recipe(group_by_length=False, max_steps=4, eval_steps=2, save_total_limit=4, load_best=False)
    whole = train(begun)
    cut = tmp_path / "cut"
    shutil.copytree(whole.output, cut)
    for left in ("adapter_config.json", "adapter_model.safetensors", "run.json"):
        (cut / left).unlink()
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    Recipe.load(cut / "recipe.yaml").replace(output=str(cut)).save(cut / "recipe.yaml")
    resumed = train(begun.replace(output=str(cut), training={"group_by_length": None}), resume=True)
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert Record.load(cut).recipe.training.group_by_length is False
    other = train(begun.replace(output=str(tmp_path / "anew"), training={"group_by_length": None}))
    assert other.adapter_sha256 != whole.adapter_sha256


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A memory that holds a batch of so many rows in training; the one number may be changed."""
    room = [16]
    forward = BertForSequenceClassification.forward

    def limited(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        if self.training and len(input_ids) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, input_ids, **inputs)

    limited.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(BertForSequenceClassification, "forward", limited)
    return room


def test_the_batch_is_halved_and_the_rows_a_step_stay(
    make_recipe: Callable[..., Recipe], memory: list[int], capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    memory[0] = 3
    auto = train(make_recipe(batch_size=8, auto_batch_size=True, max_steps=4))
    assert "8 rows do not fit into memory at once; trying 4, and 2 batches a step" in capsys.readouterr().out
    found = Recipe.load(auto.output / "recipe.yaml").training
    assert (found.batch_size, found.gradient_accumulation) == (2, 4)
    given = make_recipe(batch_size=2, gradient_accumulation=4, max_steps=4).replace(
        output=str(tmp_path / "given")
    )
    assert train(given).adapter_sha256 == auto.adapter_sha256
    assert Record.load(auto.output).recipe.training == found


def test_a_batch_that_fits_stays(
    make_recipe: Callable[..., Recipe], memory: list[int], tmp_path: Any
) -> None:
    auto = train(make_recipe(batch_size=4, auto_batch_size=True, max_steps=3))
    plain = train(make_recipe(batch_size=4, max_steps=3).replace(output=str(tmp_path / "plain")))
    assert auto.adapter_sha256 == plain.adapter_sha256


def test_odd_batches_are_divided_evenly(make_recipe: Callable[..., Recipe], memory: list[int]) -> None:
    memory[0] = 2
    output = train(make_recipe(batch_size=9, auto_batch_size=True, max_steps=1)).output
    found = Recipe.load(output / "recipe.yaml").training
    assert (found.batch_size, found.gradient_accumulation) == (1, 9)


def test_a_resumed_run_keeps_the_size_that_was_found(
    make_recipe: Callable[..., Recipe], memory: list[int]
) -> None:
    memory[0] = 2
    recipe = make_recipe(batch_size=4, auto_batch_size=True, max_steps=2)
    train(recipe)
    memory[0] = 16
    assert train(recipe, resume=True).steps == 2
    with pytest.raises(ConfigError, match="was started with another recipe"):
        train(recipe.replace(training={"batch_size": 8, "auto_batch_size": False}), resume=True)


def test_not_a_single_row_fits(make_recipe: Callable[..., Recipe], memory: list[int]) -> None:
    memory[0] = 0
    with pytest.raises(LoricaError, match="a single row does not fit into memory"):
        train(make_recipe(batch_size=2, auto_batch_size=True))


def test_other_errors_come_through(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something else")

    recipe = make_recipe(auto_batch_size=True)
    broken.__signature__ = inspect.signature(BertForSequenceClassification.forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(BertForSequenceClassification, "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        train(recipe)
