"""A run's checkpoints: which can be trusted, which is the best."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerState

from lorica.errors import FileError, LoricaError, listing
from lorica.model.pretrained.resuming import beside
from lorica.reading import read_object
from lorica.train.system import write_atomically

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
    """Delete the rest of an interrupted save, so that it is neither counted nor kept as a checkpoint.

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


# Fields of the state that start as None → what they hold later. The others keep the type of their start.
_LATER: dict[str, Any] = {
    "epoch": (int, float),
    "log_history": list,
    "best_metric": (int, float),
    "best_global_step": int,
    "best_model_checkpoint": str,
    "trial_name": (str, int, float),
    "trial_params": dict,
    "stateful_callbacks": dict,
}


def check_state(checkpoint: Path) -> None:
    """Refuse a trainer's state that it could not continue from.

    Raises:
        FileError: the file is damaged.
    """
    state = read_object(checkpoint / STATE)
    fresh = vars(TrainerState())
    wrong = [f"no field {name!r}" for name in state if name not in fresh]
    wrong += [
        f"{name} cannot be {value!r}"
        for name, value in state.items()
        if value is not None and not isinstance(value, _kind(name, fresh.get(name)))
    ]
    wrong += [f"{n} must be a number" for n in ("global_step", "max_steps") if not _counts(state.get(n))]
    history, callbacks = state.get("log_history") or [], state.get("stateful_callbacks") or {}
    if not wrong and not all(isinstance(entry, dict) and _counts(entry.get("step")) for entry in history):
        wrong.append("log_history must hold a step in each entry")
    if not wrong and not all(map(_is_callback, callbacks.values())):
        wrong.append("stateful_callbacks must hold args and attributes of each")
    if wrong:
        raise FileError(_message(checkpoint, f"{STATE} is damaged: {listing(wrong)}"))


def _kind(name: str, start: Any) -> Any:
    return _LATER.get(name) or ((int, float) if _counts(start) else object if start is None else type(start))


def _is_callback(kept: Any) -> bool:
    parts = kept if isinstance(kept, list) else [kept]
    return all(
        isinstance(part, dict) and all(isinstance(part.get(n, {}), dict) for n in ("args", "attributes"))
        for part in parts
    )


def _counts(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _message(checkpoint: Path, reason: str) -> str:
    return (
        f"{checkpoint} cannot be resumed from: {reason}. Delete that folder, and the run goes on from the "
        "checkpoint before it, or starts again"
    )


def check_moments(optimizer: Any) -> None:
    """Refuse moments that are not of their parameter's shape.

    Raises:
        ValueError: one is not.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state.get(parameter, {}).get(name)
                if moment is not None and (
                    not isinstance(moment, Tensor) or moment.shape != parameter.shape or moment.is_meta
                ):
                    shape = tuple(getattr(moment, "shape", ()))
                    raise ValueError(f"{name} is {shape}, and its parameter {tuple(parameter.shape)}")


@contextlib.contextmanager
def readable(checkpoint: str | None, what: str) -> Iterator[None]:
    """Name the checkpoint where reading a part of it fails.

    Args:
        checkpoint: its folder; None changes nothing.
        what: the part, such as "the file of random states".

    Raises:
        FileError: the part is damaged.
    """
    try:
        yield
    except LoricaError:
        raise
    except Exception as error:  # damaged pickles fail in whatever way their bytes say
        if checkpoint is None:
            raise
        reason = f"{what} cannot be read: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        raise FileError(_message(Path(checkpoint), reason)) from error
