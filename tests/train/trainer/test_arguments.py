from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.errors import ConfigError
from lorica.train import TrainingConfig
from lorica.train.trainer.arguments import training_arguments


def config(**values: Any) -> TrainingConfig:
    fields: dict[str, Any] = {"learning_rate": 1e-3, "epochs": 3}
    return TrainingConfig(**fields | values)


def test_fields_reach_transformers(tmp_path: Path) -> None:
    given = config(
        learning_rate=2e-4, epochs=4, batch_size=3, warmup_ratio=0.1, seed=7, group_by_length=True,
        arguments={"adam_beta2": 0.98},
    )  # fmt: skip
    args = training_arguments(given, tmp_path, "accuracy", validated=True)
    assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (2e-4, 4, 3)
    assert (args.warmup_steps, args.seed, args.data_seed, args.adam_beta2) == (0.1, 7, 7, 0.98)
    assert (args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better) == (
        True,
        "accuracy",
        True,
    )
    assert args.train_sampling_strategy == "group_by_length"
    drawn = training_arguments(config(group_by_length=False), tmp_path, "accuracy", validated=True)
    assert drawn.train_sampling_strategy == "random"


@pytest.mark.parametrize(("eval_steps", "strategy"), [(None, "epoch"), (5, "steps")])
def test_a_checkpoint_follows_each_evaluation(tmp_path: Path, eval_steps: int | None, strategy: str) -> None:
    args = training_arguments(
        config(eval_steps=eval_steps, save_steps=3), tmp_path, "accuracy", validated=True
    )
    assert args.eval_strategy == args.save_strategy == strategy
    assert eval_steps is None or args.save_steps == args.eval_steps == eval_steps


def test_without_validation_there_is_no_best(tmp_path: Path) -> None:
    args = training_arguments(config(), tmp_path, "accuracy", validated=False)
    assert (args.eval_strategy, args.load_best_model_at_end) == ("no", False)
    with pytest.raises(ConfigError, match="early_stopping_patience needs validation rows"):
        training_arguments(config(early_stopping_patience=1), tmp_path, "accuracy", validated=False)


def test_the_lowest_loss_is_the_best(tmp_path: Path) -> None:
    args = training_arguments(config(metric_for_best="loss"), tmp_path, "accuracy", validated=True)
    assert args.greater_is_better is False


def test_what_stops_early_may_end_with_its_last_weights(tmp_path: Path) -> None:
    given = config(load_best=False, early_stopping_patience=2)
    args = training_arguments(given, tmp_path, "accuracy", validated=True)
    assert (args.load_best_model_at_end, args.metric_for_best_model) == (False, "accuracy")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"arguments": {"num_train_epochs": 3}},
            "set training.epochs instead of training.arguments.num_train_epochs",
        ),
        ({"arguments": {"learning_rate": 3}}, "set training.learning_rate instead"),
        ({"arguments": {"adam_beta_2": 0.9}}, "have no 'adam_beta_2'; did you mean 'adam_beta2'"),
        ({"arguments": {"optim": "sgdd"}}, "transformers refuses these training arguments"),
        ({"fp16": True}, "fp16 needs a GPU"),
        ({"report_to": ["wandbb"]}, "a tracker that transformers does not have; did you mean 'wandb'"),
        ({"report_to": ["comet_ml"]}, "names 'comet_ml', whose package is not installed here"),
    ],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        training_arguments(config(**values), tmp_path, "accuracy", validated=True)


def test_a_schedule_ends_below_where_it_begins() -> None:
    with pytest.raises(ConfigError, match="learning_rate must be more than 1e-7, where the polynomial"):
        TrainingConfig(learning_rate=1e-8, lr_scheduler="polynomial")
    TrainingConfig(learning_rate=1e-8)


def test_an_old_gpu_has_no_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="use fp16"):
        training_arguments(config(bf16=True), tmp_path, "accuracy", validated=True)
