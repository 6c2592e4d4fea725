"""A run's adapter on its model: new, started from training rows, or with another adapter's weights.

EVA, CorDA and LoRA-GA see the same rows each time, drawn by the run's seed, in evaluation or training mode as
each needs it. A resumed run takes its start from the checkpoint, so they look at the rows once.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, track
from torch import nn
from transformers import PreTrainedModel

from lorica.adapter import Adapter
from lorica.config import LoraConfig
from lorica.errors import AdapterError, FileError, listing
from lorica.model import adapt, adapters, load, save
from lorica.model.files import extract, overwrite
from lorica.model.pretrained.resuming import restore_trained
from lorica.model.starts import initialize_lora_eva_weights
from lorica.model.starts import preprocess_corda as look_for_corda
from lorica.model.starts import preprocess_loraga as look_for_loraga
from lorica.pieces.whole import copies_of
from lorica.state import adapted
from lorica.train.console import duration
from lorica.train.distributed.group import world
from lorica.train.trainer.checkpoints import last_checkpoint

if TYPE_CHECKING:
    from lorica.train.prepared import Prepared


def adapt_from_rows(
    prepared: Prepared, method: LoraConfig, output: Path, *, resume: bool, console: Console
) -> PreTrainedModel:
    """Put the run's adapter on its model, started from training rows.

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
    value = method.init_lora_weights
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


START = "start"
"""Beside the checkpoints: the adapter as a run began, which its loss compares with."""


def keep_start(model: PreTrainedModel, output: Path, *, resumed: bool) -> None:
    """Write how a run's adapter starts; or bring that start back, for a reference to be made of it.

    Args:
        model: adapted model.
        output: the run's folder.
        resumed: whether there is a checkpoint to go on from, which is read later.

    Raises:
        FileError: the start of the run that goes on is gone.
    """
    folder = start_of(output)
    if not resumed:
        save(model, folder)
    elif not restore_trained(model, folder):
        raise FileError(
            f"{folder} is gone, which holds how the run began: what it learns is measured against that. "
            "Bring it back, or start anew with --overwrite"
        )


def start_of(output: Path) -> Path:
    """The folder of how a run's adapter began."""
    return output / "checkpoints" / START


def _batches(prepared: Prepared) -> list[Any]:
    """Batches of training rows, the same for the same seed, and in each process: those of all together."""
    training, task = prepared.recipe.training, prepared.task
    rows = prepared.splits["train"].features
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(training.seed)).tolist()
    size = training.batch_size * world()
    order = order[: training.start_batches * size]
    wanted = {*inspect.signature(prepared.model.forward).parameters, *task.label_columns}
    picked = [{key: value for key, value in rows[i].items() if key in wanted} for i in order]
    collate = task.collator(prepared.tokenizer)
    return [collate(picked[i : i + size]) for i in range(0, len(picked), size)]


def _device(prepared: Prepared) -> torch.device:
    """The device on which the run will train."""
    if prepared.recipe.training.arguments.get("use_cpu"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextmanager
def _bar(console: Console) -> Iterator[Any]:
    """Show how many layers have converged."""
    columns = TextColumn("eva: settled layers"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda settled, total: progress.update(task, completed=settled, total=total)


def _ranks(model: PreTrainedModel) -> str:
    """The ranks that EVA chose, if they differ."""
    config = adapters(model)["default"]
    assert isinstance(config, LoraConfig)
    found = {config.r, *config.rank_pattern.values()}
    return f"; ranks from {min(found)} to {max(found)}" if len(found) > 1 else ""


def warm_start(model: nn.Module, start: Adapter, *, head: bool) -> None:
    """Give the one adapter on a model another's weights.

    Args:
        model: adapted model.
        start: the weights to begin with.
        head: take the modules that are trained whole too, such as the classifier; else they stay as they are.

    Raises:
        AdapterError: the adapter on the model has other layers, ranks or scales; the model is untouched.
    """
    own = extract(model)
    scales = {
        path: (factors.scale, own.factors[path].scale)
        for path, factors in start.factors.items()
        if path in own.factors
    }
    unlike = [
        f"{path} ({theirs:g}, here {ours:g})" for path, (theirs, ours) in scales.items() if theirs != ours
    ]
    if unlike:
        raise AdapterError(
            f"init_from has another scale in {listing(unlike, limit=3)}; give method.r, method.lora_alpha "
            "and method.use_rslora the values that it was trained with"
        )
    if not head:
        _, state = adapted(model)
        heads = {held.key for held in copies_of(state, state.one(None))}
        theirs = {name: tensor for name, tensor in start.extras.items() if name not in heads}
        ours = {name: tensor for name, tensor in own.extras.items() if name in heads}
        start = dataclasses.replace(start, extras={**theirs, **ours})
    try:
        overwrite(model, start)
    except AdapterError as error:
        hint = "; leave init_head off for a head of another shape" if head else ""
        raise AdapterError(f"init_from cannot start this training: {error}{hint}") from error
