"""What a recipe leaves open of its training: learning rate, passes, and the batch that fits into memory.

    learning rate   5e-4 · (2000 / width)^0.43 · the method's factor
    passes          3, or as many as make 600 steps (150 where the head is pretrained too), up to 40

Whoever gives a value has that value. `run.json` keeps what was chosen.

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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from lorica.config import AdapterConfig
from lorica.errors import LoricaError
from lorica.model import adapters
from lorica.train.console import quiet
from lorica.train.settings import TrainingConfig
from lorica.train.tasks import Task
from lorica.train.tasks.base import NEW, own_loss
from lorica.train.trainer.arguments import training_arguments
from lorica.train.trainer.trainer import Trainer

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


def settled(training: TrainingConfig, rows: int, model: nn.Module) -> TrainingConfig:
    """The training with a value for what it leaves open.

    Args:
        training: as the user gave it.
        rows: to learn from.
        model: adapted, or else trained whole.
    """
    if training.learning_rate is None:
        training = dataclasses.replace(training, learning_rate=rate(model))
    if training.epochs is None:
        open_ended = training.max_steps is None
        head = "new head" if getattr(model, NEW, ()) else "pretrained head"
        given = passes(rows, training, STEPS[head]) if open_ended else PASSES
        training = dataclasses.replace(training, epochs=given)
    return training


def chosen(before: TrainingConfig, after: TrainingConfig) -> dict[str, float]:
    """What `settled` chose, by the names of its fields; passes only where they decide."""
    names = ["learning_rate", *(["epochs"] if after.max_steps is None else [])]
    return {name: getattr(after, name) for name in names if getattr(before, name) is None}


def announced(found: dict[str, float], rows: int, training: TrainingConfig) -> str:
    """A line on what was chosen, or an empty one."""
    parts = []
    if "learning_rate" in found:
        parts.append(f"learning rate {found['learning_rate']:g}")
    if "epochs" in found:
        steps = math.ceil(found["epochs"] * _steps_a_pass(rows, training))
        parts.append(f"{found['epochs']:g} passes over {rows:,} rows, {steps:,} steps")
    options = " ".join(f"--training.{name}" for name in found)
    return f"chosen: {'; '.join(parts)} ({options} to choose otherwise)" if parts else ""


def rate(model: nn.Module) -> float:
    """The learning rate for what trains of a model, to two digits."""
    width = width_of(model)
    factors = [_factor(config) for config in adapters(model).values()] or [_FACTORS["full"]]
    value = _RATE * min(factors) * (1.0 if width is None else (_WIDTH / width) ** _EXPONENT)
    return float(f"{value:.1e}")


def passes(rows: int, training: TrainingConfig, least: int) -> float:
    """Passes over so many rows, of which at least so many steps are made."""
    return max(PASSES, min(MOST_PASSES, math.ceil(least / _steps_a_pass(rows, training))))


def width_of(model: nn.Module) -> int | None:
    """Numbers per token between a model's blocks, if its configuration says."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        width = getattr(text, name, None)
        if isinstance(width, int) and width > 0:
            return width
    return None


def _steps_a_pass(rows: int, training: TrainingConfig) -> int:
    return max(1, math.ceil(rows / (training.batch_size * training.gradient_accumulation)))


def _factor(config: AdapterConfig) -> float:
    """Of several methods that train together, the one that wants the lowest rate decides."""
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
    """Find the batch size by steps on the longest rows, which change nothing; halve it while memory ends.

    Args:
        model: the model, as it will train.
        task: what it learns.
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
        args = training_arguments(once, Path(folder), task.best_metric, validated=False)
        # The optimizer takes its memory too, and at this rate moves nothing.
        args.learning_rate = 0.0
        args.save_strategy = "no"  # type: ignore[assignment]
        trainer = Trainer(
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
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            trainer.accelerator.free_memory()
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
