"""A run's checkpoint as the trainer reads and writes it: damage is named, and no secret is written down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerState

from lorica.errors import FileError, LoricaError, listing
from lorica.reading import read_object
from lorica.train.checkpoints import STATE
from lorica.train.secrets import is_secret

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


class ResumingMixin:
    """For a Trainer: what it cannot read of a checkpoint is a FileError that names the checkpoint."""

    args: Any
    optimizer: Any

    def _save(self, *given: Any, **named: Any) -> None:
        hidden = {name: value for name, value in vars(self.args).items() if is_secret(name, value)}
        for name in hidden:
            setattr(self.args, name, None)
        try:
            super()._save(*given, **named)  # type: ignore[misc]
        finally:
            for name, value in hidden.items():
                setattr(self.args, name, value)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _named(checkpoint, "the optimizer's or the schedule's file"):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            if checkpoint is not None and self.optimizer is not None:
                _check_moments(self.optimizer)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _named(checkpoint, "the file of random states"):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]


def check_state(checkpoint: Path) -> None:
    """Refuse a trainer's state that it could not go on from.

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


def _check_moments(optimizer: Any) -> None:
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
def _named(checkpoint: str | None, what: str) -> Iterator[None]:
    try:
        yield
    except LoricaError:
        raise
    except Exception as error:  # damaged pickles fail in whatever way their bytes say
        if checkpoint is None:
            raise
        reason = f"{what} cannot be read: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        raise FileError(_message(Path(checkpoint), reason)) from error


def _message(checkpoint: Path, reason: str) -> str:
    return (
        f"{checkpoint} cannot be resumed from: {reason}. Delete that folder, and the run goes on from the "
        "checkpoint before it, or starts again"
    )
