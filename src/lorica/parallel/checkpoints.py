"""Checkpoints to go on from: trained parameters and the optimizer, each rank's part by itself (torch's DCP).

They hold nothing of the frozen base, and are read on any number of ranks, sharded or not.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from lorica.errors import AdapterError, FileError
from lorica.state import adapted

_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(model: nn.Module, optimizer: Optimizer, directory: str | Path) -> Path:
    """Write an adapted model's trained parameters and their optimizer's state; every rank must call this.

    Each rank writes its parts. A folder that was written before is replaced once the new one is whole.
    `lorica.save` writes the adapter for use; this is for going on.

    Args:
        model: adapted model, sharded, split or neither.
        optimizer: over the trained parameters.
        directory: a folder that all ranks reach.

    Returns:
        The folder.

    Raises:
        StateError: the model carries no adapter, or is merged.
    """
    _, state = adapted(model)
    state.check_unmerged("write a checkpoint")
    directory = Path(directory)
    partial, before = (directory.with_name(f"{directory.name}.{end}") for end in ("partial", "before"))
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _wait()
    with _quiet():
        dcp.save(_state(model, optimizer), checkpoint_id=partial, no_dist=not distributed.is_initialized())
    _wait()
    if first:
        shutil.rmtree(before, ignore_errors=True)
        if directory.exists():
            directory.rename(before)  # deleting takes long, and a run may be killed meanwhile
        partial.rename(directory)
        shutil.rmtree(before, ignore_errors=True)
    _wait()
    return directory


def load_checkpoint(model: nn.Module, optimizer: Optimizer, directory: str | Path) -> None:
    """Go on from a checkpoint of `save_checkpoint`, in place; every rank must call this.

    Args:
        model: adapted model, made as the one that was saved; on how many ranks does not matter.
        optimizer: of the same kind, over the trained parameters.
        directory: the folder.

    Raises:
        FileError: there is no checkpoint in the folder.
        AdapterError: the checkpoint is of an adapter of another make.
        StateError: the model carries no adapter, or is merged.
    """
    _, state = adapted(model)
    state.check_unmerged("load a checkpoint")
    if not (Path(directory) / ".metadata").is_file():
        raise FileError(
            f"{directory} holds no checkpoint of torch.distributed.checkpoint; give the folder that "
            "lorica.parallel.save_checkpoint returned"
        )
    found = _state(model, optimizer)
    try:
        with _quiet():
            dcp.load(found, checkpoint_id=directory, no_dist=not distributed.is_initialized())
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise AdapterError(
            f"the checkpoint in {directory} does not fit the adapter on the model, or its optimizer: {error}"
        ) from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=found["model"],
        optim_state_dict=found["optimizer"],
        options=_OPTIONS,
    )


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    values, steps = get_state_dict(model, optimizer, options=_OPTIONS)
    return {"model": values, "optimizer": steps}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")
        yield


def _wait() -> None:
    if distributed.is_initialized():
        distributed.barrier()
