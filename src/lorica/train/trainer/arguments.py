"""From `TrainingConfig` to transformers' `TrainingArguments`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lorica.errors import ConfigError, listing, nearest
from lorica.train.settings import TrainingConfig

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mse", "mae", "ter"})

# Fields that say the same as one of TrainingConfig; setting both would leave the user to guess which one
# counts.
_OWNED = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "warmup_steps": "warmup_ratio",
    "lr_scheduler_type": "lr_scheduler",
    "metric_for_best_model": "metric_for_best",
    "load_best_model_at_end": "load_best",
    "train_sampling_strategy": "group_by_length",
    "activation_checkpointing": "gradient_checkpointing",
    "eval_strategy": "eval_steps",
    "save_strategy": "save_steps",
}


def training_arguments(
    config: TrainingConfig, checkpoints: Path, best_metric: str, *, validated: bool
) -> TrainingArguments:
    """The arguments for a run.

    Args:
        config: how to train, settled.
        checkpoints: folder for the checkpoints.
        best_metric: the task's own metric for the best checkpoint.
        validated: whether there are validation rows.

    Raises:
        ConfigError: the device lacks what is asked for, or an argument is unknown or given twice.
    """
    assert config.learning_rate is not None, "settled has a value for it"
    assert config.epochs is not None
    check_device(config)
    metric = config.metric_for_best or best_metric
    best = validated and (config.load_best or config.early_stopping_patience is not None)
    if config.early_stopping_patience is not None and not validated:
        raise ConfigError(
            "early_stopping_patience needs validation rows; give --data.validation or a validation_fraction"
        )
    strategy = ("epoch" if config.eval_steps is None else "steps") if validated else "no"
    every = {"eval_steps": config.eval_steps, "save_steps": config.eval_steps} if strategy == "steps" else {}
    values: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps if config.max_steps is not None else -1,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "weight_decay": config.weight_decay,
        "warmup_steps": config.warmup_ratio,
        "lr_scheduler_type": config.lr_scheduler,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "data_seed": config.seed,
        "eval_strategy": strategy,
        # A checkpoint follows each evaluation; `CheckpointCallback` adds those of `save_steps`.
        "save_strategy": strategy if validated else "epoch",
        **every,
        "save_total_limit": config.save_total_limit,
        "load_best_model_at_end": best and config.load_best,
        "metric_for_best_model": metric if best else None,
        "greater_is_better": metric.removeprefix("eval_") not in LOWER_IS_BETTER if best else None,
        "train_sampling_strategy": "group_by_length" if config.group_by_length else "random",
        "bf16": config.bf16,
        "use_cpu": config.bf16 and not torch.accelerator.is_available(),  # else transformers asks for a GPU
        "fp16": config.fp16,
        "activation_checkpointing": config.gradient_checkpointing,
        "logging_steps": config.logging_steps,
        "include_num_input_tokens_seen": "non_padding",
        "restore_callback_states_from_checkpoint": True,  # else early stopping forgets how long it has waited
        # TensorBoard's callback is made in `fit`, which knows the folder; the other trackers know their own.
        "report_to": [name for name in config.report_to if name != "tensorboard"] or "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **config.arguments,
    }
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"transformers refuses these training arguments: {error}") from error


def check_device(config: TrainingConfig) -> None:
    """Refuse what this machine or the installed transformers cannot do, before anything is loaded.

    Raises:
        ConfigError: the device lacks what is asked for, or an argument is unknown or given twice.
    """
    _check_extra(config)
    _check_precision(config)
    _check_trackers(config)


def _check_extra(config: TrainingConfig) -> None:
    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    ours = {item.name for item in dataclasses.fields(TrainingConfig)}
    for name in config.arguments:
        if name in _OWNED or name in ours:
            raise ConfigError(f"set training.{_OWNED.get(name, name)} instead of training.arguments.{name}")
        if name not in known:
            raise ConfigError(f"transformers' TrainingArguments have no {name!r}{nearest(name, known)}")


def _check_precision(config: TrainingConfig) -> None:
    if config.fp16 and not torch.cuda.is_available():
        raise ConfigError(
            "fp16 needs a GPU, and there is none; leave it off, or use bf16 where the processor has it"
        )
    if config.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError("bf16 needs a GPU of the Ampere generation or newer; use fp16 on this one")


def _check_trackers(config: TrainingConfig) -> None:
    wanted = [name for name in config.report_to if name not in ("tensorboard", "flyte", "all", "none")]
    if not wanted:
        return
    from transformers import integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known, there = INTEGRATION_TO_CALLBACK, integrations.get_available_reporting_integrations()
    for name in wanted:
        if name not in known:
            hint = nearest(name, known) or f"; it has: {listing(known)}"
            raise ConfigError(f"report_to names {name!r}, a tracker that transformers does not have{hint}")
        if name not in there:
            raise ConfigError(f"report_to names {name!r}, whose package is not installed here")
