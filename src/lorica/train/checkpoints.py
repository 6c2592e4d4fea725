"""Which checkpoints of a run can be trusted: those that were written to the end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from lorica.errors import FileError
from lorica.model.resuming import beside
from lorica.reading import read_object
from lorica.train.files import write_atomically

STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = (
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)


def last_checkpoint(directory: str | Path) -> Path | None:
    """The newest complete checkpoint in a folder.

    A process that is killed while it saves leaves a part of one; it is passed over.

    Args:
        directory: the folder that holds ``checkpoint-<step>`` folders.

    Returns:
        The checkpoint's folder, or None when there is none.
    """
    complete = [path for path in _all(directory) if is_complete(path)]
    return max(complete, key=_step, default=None)


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to the end.

    The trainer's state is written last, so the checkpoint is whole if that file is: if it reads, and speaks
    of the step that the folder is named after. The other files are looked for too, since a deletion may also
    be cut short.
    """
    checkpoint = Path(checkpoint)
    try:
        state = read_object(checkpoint / STATE)
    except (FileNotFoundError, FileError):
        return False
    there = any((checkpoint / name).is_file() for name in _WEIGHTS) or bool(beside(checkpoint))
    resumable = all((checkpoint / name).is_file() for name in ("optimizer.pt", "scheduler.pt"))
    return state.get("global_step") == _step(checkpoint) and there and resumable


def discard_incomplete(directory: str | Path) -> list[Path]:
    """Delete what an interrupted save left, so that it is neither counted nor kept as a checkpoint.

    Returns:
        The folders deleted.
    """
    broken = [path for path in _all(directory) if not is_complete(path)]
    for path in broken:
        shutil.rmtree(path)
    return broken


def find_best(checkpoint: Path) -> None:
    """Make a checkpoint's record of the best one right again after the run's folder was moved or renamed."""
    state = read_object(checkpoint / STATE)
    recorded = state.get("best_model_checkpoint")
    if not recorded:
        return
    beside = checkpoint.parent / Path(recorded).name
    if not Path(recorded).is_dir() and beside.is_dir():
        state["best_model_checkpoint"] = str(beside)
        write_atomically(checkpoint / STATE, json.dumps(state, indent=2, sort_keys=True) + "\n")


def _all(directory: str | Path) -> list[Path]:
    directory = Path(directory)
    return (
        [path for path in directory.iterdir() if _step(path) >= 0 and path.is_dir()]
        if directory.is_dir()
        else []
    )


def _step(path: Path) -> int:
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else -1
