"""Putting a run's adapter on its model, where need be by a start that looks at training rows first.

EVA, CorDA and LoRA-GA see the same rows each time: drawn by the run's seed, in evaluation or training mode as
each wants it. A resumed run takes the start from its checkpoint, so they are looked at once.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, track
from transformers import PreTrainedModel

from lorica.config import AdapterConfig, LoraConfig
from lorica.config.inits import FROM_DATA
from lorica.model import adapt, adapters, initialize_lora_eva_weights, load
from lorica.model import preprocess_corda as look_for_corda
from lorica.model import preprocess_loraga as look_for_loraga
from lorica.train.checkpoints import last_checkpoint
from lorica.train.console import duration

if TYPE_CHECKING:
    from lorica.train.preparing import Prepared


def start(
    prepared: Prepared, method: AdapterConfig, output: Path, *, resume: bool, console: Console
) -> PreTrainedModel:
    """Put a new adapter on a run's model.

    Args:
        prepared: the run.
        method: what trains.
        output: its folder; a checkpoint in it holds the start already.
        resume: whether to look for one.
        console: where to show progress.

    Returns:
        The same model, adapted.

    Raises:
        LoricaError: the adapter cannot be put on this model, or cannot start from these rows.
    """
    model, seed = prepared.model, prepared.recipe.training.seed
    value = method.init_lora_weights if isinstance(method, LoraConfig) else True
    if not isinstance(method, LoraConfig) or value not in FROM_DATA:
        return adapt(model, method, seed=seed)
    checkpoint = last_checkpoint(output / "checkpoints") if resume else None
    if checkpoint is not None:
        return load(model, checkpoint, trainable=True)
    batches = _batches(prepared)
    if not getattr(model, "is_quantized", False):
        model.to(_device(prepared))  # pyright: ignore[reportArgumentType]
    began = time.perf_counter()
    if value == "eva":
        adapt(model, method, seed=seed)
        with _bar(console) as show:
            initialize_lora_eva_weights(model, batches, seed=seed, progress=show)
    else:
        look = look_for_corda if value == "corda" else look_for_loraga
        look(model, method, track(batches, f"{value}: batches", console=console, transient=True))
        adapt(model, method, seed=seed)
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    took = duration(time.perf_counter() - began)
    console.print(f"{value}: started from {rows:,} training rows in {took}{_ranks(model)}")
    return model


def _batches(prepared: Prepared) -> list[Any]:
    """Some batches of training rows, the same for the same seed."""
    training, task = prepared.recipe.training, prepared.task
    rows = prepared.splits["train"].features
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(training.seed)).tolist()
    order = order[: training.start_batches * training.batch_size]
    wanted = {*inspect.signature(prepared.model.forward).parameters, *task.label_columns}
    picked = [{key: value for key, value in rows[i].items() if key in wanted} for i in order]
    collate = task.collator(prepared.tokenizer)
    size = training.batch_size
    return [collate(picked[i : i + size]) for i in range(0, len(picked), size)]


def _device(prepared: Prepared) -> torch.device:
    """Where the run is going to train."""
    if prepared.recipe.training.arguments.get("use_cpu"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextmanager
def _bar(console: Console) -> Iterator[Any]:
    """Show how many layers have settled."""
    columns = TextColumn("eva: settled layers"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda settled, total: progress.update(task, completed=settled, total=total)


def _ranks(model: PreTrainedModel) -> str:
    """What EVA made of the ranks, if they differ."""
    config = adapters(model)["default"]
    assert isinstance(config, LoraConfig)
    found = {config.r, *config.rank_pattern.values()}
    return f"; ranks from {min(found)} to {max(found)}" if len(found) > 1 else ""
