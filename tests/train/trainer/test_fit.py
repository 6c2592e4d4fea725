from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel

import lorica
from lorica.compare.demo import freeze_encoder
from lorica.config import read_config
from lorica.errors import ConfigError, StateError
from lorica.train import Fit, Prepared, Recipe, fit, prepare


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
    kinds = {"f1", "f1_macro", "f1_binary", "precision", "recall", "matthews", "roc_auc"}
    assert set(scores) == {"loss", "accuracy", *kinds}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("acuracy", "'acuracy', which these validation rows do not give; did you mean 'accuracy'"),
        ("roc_auc", "'roc_auc', .*they give: loss, accuracy"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_before_training(
    make_recipe: Callable[..., Recipe], metric: str, message: str
) -> None:
    recipe = make_recipe(metric_for_best=metric, eval_batch_size=4)
    prepared = prepare(recipe)
    validation = prepared.splits["validation"].features
    validation = validation.filter(lambda row: row["labels"] == 0)  # of one class there is no ROC
    with pytest.raises(ConfigError, match=message):
        fit(
            prepared.model, prepared.task, prepared.tokenizer, prepared.splits["train"].features, validation,
            recipe.training, recipe.output, console=Console(file=io.StringIO()),
        )  # fmt: skip
    assert not list(Path(recipe.output).glob("checkpoints/checkpoint-*"))


def test_looking_for_the_metric_changes_no_number(make_recipe: Callable[..., Recipe]) -> None:
    def weights(**training: Any) -> bytes:
        shutil.rmtree(make_recipe().output, ignore_errors=True)
        done = start(make_recipe(**training, max_steps=3, load_best=True, eval_steps=3))
        return b"".join(p.detach().numpy().tobytes() for p in done.model.parameters() if p.requires_grad)

    assert weights(metric_for_best="roc_auc", eval_batch_size=1) == weights()


def test_the_last_evaluation_is_that_of_the_model(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(load_best=False)
    done = start(recipe)
    rows = done.trainer.eval_dataset
    assert isinstance(rows, Dataset)
    assert done.evaluated_last(rows) == done.evaluate(rows)
    assert done.evaluated_last(prepare(recipe).splits["test"].features) is None


def test_a_model_that_was_better_before_is_scored_anew(make_recipe: Callable[..., Recipe]) -> None:
    done = start(make_recipe(epochs=2, metric_for_best="accuracy", learning_rate=1e-9))
    assert done.trainer.state.best_global_step not in (None, done.steps)
    rows = done.trainer.eval_dataset
    assert isinstance(rows, Dataset)
    assert done.evaluated_last(rows) is None


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


def test_what_tensorboard_shows(make_recipe: Callable[..., Recipe]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(report_to=["tensorboard"], logging_steps=5)
    done = start(recipe)
    shown = EventAccumulator(str(Path(recipe.output) / "tensorboard")).Reload()
    tags: Any = shown.Tags()["scalars"]
    scalars = {name: shown.Scalars(name) for name in tags}
    training = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb", "epoch"}
    assert {f"train/{name}" for name in training} <= set(scalars)
    assert {"eval/loss", "eval/accuracy", "eval/f1"} <= set(scalars)
    assert [each.step for each in scalars["train/loss"]] == [5, 10, 15, 20]
    assert [each.step for each in scalars["eval/accuracy"]] == [10, 20]
    assert all(each.value > 0 for each in scalars["train/tokens_per_second"])
    logged = [entry for entry in done.history if "loss" in entry]
    assert scalars["train/loss"][-1].value == pytest.approx(logged[-1]["loss"], rel=1e-6)


def test_the_last_weights_where_the_best_are_not_asked_for(make_recipe: Callable[..., Recipe]) -> None:
    done = start(make_recipe(load_best=False))
    assert done.trainer.state.best_model_checkpoint is None


LORA = lorica.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
METHODS: dict[str, lorica.AdapterConfig] = {
    "lora": LORA,
    "all layers": LORA.replace(target_modules="all-linear", lora_dropout=0.1),
    "dora": LORA.replace(use_dora=True),
    **{
        name: read_config({"method": name, "task_type": "SEQ_CLS"})
        for name in ("bitfit", "full", "adapter-h", "pre-embed")
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_changes_nothing(
    make_recipe: Callable[..., Recipe], tmp_path: Path, name: str
) -> None:
    after = []
    for again in (False, True):
        recipe = make_recipe(gradient_checkpointing=again, gradient_accumulation=2, epochs=1)
        recipe = recipe.replace(output=str(tmp_path / str(again)))
        done = start(recipe, lambda model: lorica.adapt(model, METHODS[name], seed=0))
        assert done.steps == 5
        after.append(
            {key: value.clone() for key, value in done.model.named_parameters() if value.requires_grad}
        )
    assert after[0].keys() == after[1].keys()
    for key, value in after[0].items():
        assert torch.allclose(value, after[1][key], atol=1e-6), key


def test_prelayer_does_not_go_with_gradient_checkpointing(make_recipe: Callable[..., Recipe]) -> None:
    method = read_config({"method": "pre-layer", "task_type": "SEQ_CLS"})
    with pytest.raises(StateError, match="PreLayer does not go with gradient checkpointing"):
        start(make_recipe(gradient_checkpointing=True), lambda model: lorica.adapt(model, method, seed=0))


def test_bfloat16_on_a_processor(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    losses = []
    for bf16 in (False, True):
        done = start(make_recipe(bf16=bf16, load_best=False).replace(output=str(tmp_path / str(bf16))))
        assert all(p.dtype == torch.float32 for p in done.model.parameters())
        losses.append([entry["loss"] for entry in done.history if "loss" in entry])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.1)
