from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

import lorica
from lorica.train import Fit, Prepared, Recipe, fit, prepare
from lorica.train.demo import freeze_encoder


def start(recipe: Recipe, change: Callable[[PreTrainedModel], Any] | None = None, **options: Any) -> Fit:
    prepared: Prepared = prepare(recipe)
    if change is None:
        lorica.adapt(prepared.model, recipe.method.replace(task_type="SEQ_CLS"), seed=0)
    else:
        change(prepared.model)
    return fit(
        prepared.model,
        prepared.task,
        prepared.tokenizer,
        prepared.splits["train"].features,
        prepared.splits["validation"].features,
        recipe.training,
        recipe.output,
        console=Console(file=io.StringIO()),
        **options,
    )


@pytest.mark.parametrize("change", [None, freeze_encoder, lambda model: None], ids=["lora", "frozen", "full"])
def test_one_function_trains_an_adapter_a_head_or_everything(
    make_recipe: Callable[..., Recipe], change: Callable[[PreTrainedModel], Any] | None
) -> None:
    recipe = make_recipe()
    before = {name: p.detach().clone() for name, p in prepare(recipe).model.named_parameters()}
    done = start(recipe, change)
    assert done.steps == 20
    for name, parameter in done.model.named_parameters():
        if name in before and not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    scores = done.evaluate(prepare(recipe).splits["test"].features)
    assert set(scores) == {"loss", "accuracy", "f1", "f1_macro", "precision", "recall", "matthews", "roc_auc"}


def test_full_training_resumes_to_the_same_weights(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(load_best=False)
    whole = recipe.replace(output=str(tmp_path / "whole"))
    first = start(whole, lambda model: None)
    shutil.copytree(
        Path(whole.output) / "checkpoints" / "checkpoint-10",
        Path(recipe.output) / "checkpoints" / "checkpoint-10",
    )
    again = start(recipe, lambda model: None, resume=True)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_early_stopping(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(
        epochs=10, eval_steps=2, early_stopping_patience=2, metric_for_best="accuracy", learning_rate=1e-9
    )
    done = start(recipe)
    # At that rate nothing changes: the first evaluation is the best, two more without a better one end the
    # run.
    assert done.steps == 6
    assert done.trainer.state.best_global_step == 2
    # Killed after its last checkpoint, such a run has nothing left to train.
    again = start(recipe, resume=True)
    assert again.steps == 6
    assert again.step_seconds is None
    for one, other in zip(done.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_moved_run_still_finds_its_best(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(metric_for_best="loss", learning_rate=0.5)
    done = start(recipe)
    moved = recipe.replace(output=str(tmp_path / "moved"))
    shutil.move(recipe.output, moved.output)
    again = start(moved, resume=True)
    assert str(again.trainer.state.best_model_checkpoint).startswith(str(tmp_path / "moved"))
    for one, other in zip(done.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resume_without_a_checkpoint_starts(make_recipe: Callable[..., Recipe]) -> None:
    assert start(make_recipe(), resume=True).steps == 20


def test_tensorboard_is_written(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(report_to=["tensorboard"], max_steps=5)
    start(recipe)
    (events,) = (Path(recipe.output) / "tensorboard").iterdir()
    assert events.stat().st_size > 0


def test_the_last_weights_where_the_best_are_not_asked_for(make_recipe: Callable[..., Recipe]) -> None:
    done = start(make_recipe(load_best=False))
    assert done.trainer.state.best_model_checkpoint is None


def test_gradient_accumulation_and_checkpointing_train(make_recipe: Callable[..., Recipe]) -> None:
    done = start(make_recipe(gradient_accumulation=2, gradient_checkpointing=True))
    assert done.steps == 10
