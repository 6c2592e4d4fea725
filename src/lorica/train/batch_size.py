"""The largest batch that fits into memory, with the same number of rows a step."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from lorica.errors import LoricaError
from lorica.train.arguments import training_arguments
from lorica.train.quiet import quiet
from lorica.train.recipe import TrainingConfig
from lorica.train.tasks import Task
from lorica.train.tasks.base import own_loss
from lorica.train.trainer import Trainer


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
