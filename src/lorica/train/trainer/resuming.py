"""A run's checkpoint as the trainer reads and writes it: damage is named, and no secret is written down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.errors import FileError, LoricaError
from lorica.train.recipe import is_secret
from lorica.train.trainer.checkpoints import _message


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
