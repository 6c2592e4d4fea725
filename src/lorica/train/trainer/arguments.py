"""A recipe's training as transformers' arguments, with values for the fields that it leaves open.

    learning rate   5e-4 · (2000 / width)^0.43 · the method's factor
    passes          3, or as many as make 600 steps (150 where the head is pretrained too), up to 40
    order           rows of similar lengths together, or at random, as suits the task's loss
    batch           where that is asked for: the largest that fits into memory, with as many rows per step

A value that the recipe gives stays. `run.json` keeps what was chosen.

Sources:
    Schulman and Thinking Machines Lab, 2025, "LoRA Without Regret": LoRA's best rate is ten times that of
    full fine-tuning, whatever the rank, and falls with the width of the model: the exponents that fit best
    are 0.78 for Llama and 0.08 for Qwen, of which this is the middle.
    The factors of the other methods are what `bench/compare_methods.py` chose on validation rows.
    Zhang et al., 2021, "Revisiting Few-sample BERT Fine-tuning", and Mosbach et al., 2021, "On the Stability
    of Fine-tuning BERT": with few rows it is the number of steps that three passes lack.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from lorica.config import AdapterConfig
from lorica.errors import ConfigError, LoricaError, listing, nearest
from lorica.model import adapters
from lorica.train.console import quiet
from lorica.train.distributed.group import launched, on_cpu, world
from lorica.train.settings import TrainingConfig
from lorica.train.tasks import Task
from lorica.train.tasks.base import NEW_PARAMETERS, own_loss
from lorica.train.trainer.trainer import arguments_of, trainer_of

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
    config: TrainingConfig,
    checkpoints: Path,
    best_metric: str,
    *,
    validated: bool,
    make: Callable[[dict[str, Any]], TrainingArguments] | None = None,
) -> TrainingArguments:
    """The arguments for a run.

    Args:
        config: how to train, with its defaults.
        checkpoints: folder for the checkpoints.
        best_metric: the task's own metric for the best checkpoint.
        validated: whether there are validation rows.
        make: makes them of transformers' fields; for a trainer that has more. None makes transformers' own.

    Raises:
        ConfigError: the device lacks a feature that is asked for, or an argument is unknown or given twice.
    """
    assert config.learning_rate is not None, "with_defaults has chosen one"
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
        # Else transformers asks for a GPU, or takes several processes for one each.
        "use_cpu": on_cpu() and (config.bf16 or launched() > 1),
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
        return TrainingArguments(**values) if make is None else make(values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"transformers refuses these training arguments: {error}") from error


def check_device(config: TrainingConfig) -> None:
    """Refuse a setting that this machine or the installed transformers cannot do, before anything is loaded.

    Raises:
        ConfigError: the device lacks a feature that is asked for, or an argument is unknown or given twice.
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


LEFT_OPEN = ("learning_rate", "epochs", "group_by_length")
"""Fields of the training for which `with_defaults` chooses a value where they are None."""

PASSES = 3.0

STEPS = {"new head": 600, "pretrained head": 150}
"""The fewest steps that a run takes. A model that writes starts from what it can do already."""

MOST_PASSES = 40.0

_RATE, _WIDTH, _EXPONENT = 5e-4, 2000, 0.43

_FACTORS = {
    "full": 0.1,
    "top": 0.3,
    "bitfit": 3.0,
    "adapter-h": 2.0,
    "adapter-l": 2.0,
    "adapter-p": 2.0,
    "adapter-d": 2.0,
    "pre-embed": 30.0,
    "pre-layer": 20.0,
}


def with_defaults(training: TrainingConfig, rows: int, model: nn.Module, task: Task) -> TrainingConfig:
    """The training with a value for each setting that it leaves open.

    Args:
        training: as the user gave it.
        rows: to learn from, as many as a pass reads.
        model: adapted, or else trained whole.
        task: what is learned.
    """
    training = dataclasses.replace(training, group_by_length=task.by_length(training))
    if training.learning_rate is None:
        training = dataclasses.replace(training, learning_rate=learning_rate_for(model))
    if training.epochs is None:
        open_ended = training.max_steps is None
        head = "new head" if getattr(model, NEW_PARAMETERS, ()) else "pretrained head"
        given = passes(rows, training, STEPS[head]) if open_ended else PASSES
        training = dataclasses.replace(training, epochs=given)
    return training


def chosen_defaults(before: TrainingConfig, after: TrainingConfig) -> dict[str, float]:
    """The values that `with_defaults` chose, by field; passes only where they decide."""
    names = [name for name in LEFT_OPEN if name != "epochs" or after.max_steps is None]
    return {name: getattr(after, name) for name in names if getattr(before, name) is None}


def describe_defaults(
    found: dict[str, float], rows: int, training: TrainingConfig, *, copies: int = 1
) -> str:
    """A line about the chosen values, or an empty one.

    Args:
        found: the values, by field.
        rows: to learn from.
        training: with its values.
        copies: rows of a batch that each of them makes.
    """
    parts = []
    if "learning_rate" in found:
        parts.append(f"learning rate {found['learning_rate']:g}")
    if "epochs" in found:
        steps = math.ceil(found["epochs"] * _steps_a_pass(rows * copies, training))
        parts.append(f"{found['epochs']:g} passes over {rows:,} rows, {steps:,} steps")
    if "group_by_length" in found:
        parts.append("rows of similar lengths together" if found["group_by_length"] else "rows at random")
    options = " ".join(f"--training.{name}" for name in found)
    return f"chosen: {'; '.join(parts)} ({options} to choose otherwise)" if parts else ""


def learning_rate_for(model: nn.Module) -> float:
    """The learning rate for a model's trained parameters, to two digits."""
    width = width_of(model)
    factors = [_factor(config) for config in adapters(model).values()] or [_FACTORS["full"]]
    value = _RATE * min(factors) * (1.0 if width is None else (_WIDTH / width) ** _EXPONENT)
    return float(f"{value:.1e}")


def passes(rows: int, training: TrainingConfig, least: int) -> float:
    """Passes over the rows that make at least `least` steps."""
    return max(PASSES, min(MOST_PASSES, math.ceil(least / _steps_a_pass(rows, training))))


def width_of(model: nn.Module) -> int | None:
    """Width of a model between its blocks, in numbers per token, if its configuration names it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        width = getattr(text, name, None)
        if isinstance(width, int) and width > 0:
            return width
    return None


def _steps_a_pass(rows: int, training: TrainingConfig) -> int:
    return max(1, math.ceil(rows / (training.batch_size * training.gradient_accumulation * world())))


def _factor(config: AdapterConfig) -> float:
    """Of several methods that train together, the one with the lowest rate decides."""
    lora, others = config.members()
    factors: list[float] = [*([1.0] if lora is not None else []), *_others(others)]
    return min(factors, default=1.0)


def _others(configs: Iterable[Any]) -> list[float]:
    return [_FACTORS.get(config.method, 1.0) for config in configs]


def fitting_batch(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    training: TrainingConfig,
    console: Console,
) -> TrainingConfig:
    """Find the batch size by steps on the longest rows, which change nothing; halve it until memory suffices.

    Args:
        model: the model, as it will train.
        task: the task.
        tokenizer: its tokenizer.
        rows: encoded rows to learn from.
        training: how it will train. Its batch size is the largest that is tried.
        console: where a smaller batch is announced.

    Returns:
        The same training with a batch that fits, and as many more batches a step.

    Raises:
        LoricaError: not even a single row fits.
    """
    order = sorted(range(len(rows)), key=rows["length"].__getitem__, reverse=True)
    while True:
        size = training.batch_size
        try:
            _step(model, task, tokenizer, rows.select(order[:size]), training)
            return training
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if size == 1:
                raise LoricaError(
                    "a single row does not fit into memory; take a smaller max_length, "
                    "gradient_checkpointing, a quantization or a smaller model"
                ) from error
        smaller = max(part for part in range(1, size) if size % part == 0)
        batches = training.gradient_accumulation * (size // smaller)
        training = dataclasses.replace(training, batch_size=smaller, gradient_accumulation=batches)
        console.print(
            f"{size} rows do not fit into memory at once; trying {smaller}, and {batches} batches a step"
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _step(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    training: TrainingConfig,
) -> None:
    once = dataclasses.replace(
        training, max_steps=1, gradient_accumulation=1, early_stopping_patience=None, report_to=[]
    )
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = training_arguments(
            once,
            Path(folder),
            task.best_metric,
            validated=False,
            make=lambda values: arguments_of(task, values, rows.column_names, training.max_length),
        )
        # The optimizer takes its memory too, and at this rate moves nothing.
        args.learning_rate = 0.0
        args.save_strategy = "no"  # type: ignore[assignment]
        trainer = trainer_of(task, training.seed)(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=task.collator(tokenizer),
            loss=own_loss(task),
            loraplus_lr_ratio=training.loraplus_lr_ratio,
            chunked_loss=training.chunked_loss,
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            trainer.close()
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            trainer.accelerator.free_memory()
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
