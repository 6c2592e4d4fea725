from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from lorica.errors import ConfigError, LoricaError
from lorica.train import Recipe, Record, train


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
