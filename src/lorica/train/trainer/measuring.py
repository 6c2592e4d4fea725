"""What the log of a run says of its speed and memory, for TensorBoard and every other tracker."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import transformers
from torch import Tensor

from lorica.train.system import peak_memory

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object


def learned(model: Any, args: transformers.TrainingArguments, state: transformers.TrainerState) -> int:
    """How much a run has learned from so far, in what `unit` says: tokens, padding apart, or rows."""
    if unit(model) == "tokens":
        return int(state.num_input_tokens_seen)
    return state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def unit(model: Any) -> Literal["tokens", "samples"]:
    """What there is most sense in counting: "samples" for images, sound, and whatever else is no tokens."""
    return "tokens" if getattr(model, "main_input_name", "input_ids") == "input_ids" else "samples"


class MeasuringMixin(_Base):
    """Adds to entries with a training loss the speed and ``peak_memory_gb``.

    The speed is ``tokens_per_second``, padding apart, or ``samples_per_second`` where the model reads no
    tokens.
    """

    _since: tuple[float, int] | None = None

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """A step of training, from the first of which time is measured."""
        if self._since is None:
            self._since = time.perf_counter(), learned(self.model, self.args, self.state)
        return super().training_step(*args, **options)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log; see transformers' Trainer."""
        if "loss" in logs and self._since is not None:
            began, seen = self._since
            self._since = time.perf_counter(), learned(self.model, self.args, self.state)
            logs[f"{unit(self.model)}_per_second"] = round(
                (self._since[1] - seen) / max(self._since[0] - began, 1e-9), 1
            )
            logs["peak_memory_gb"] = round(peak_memory() / 1e9, 3)
        super().log(logs, *args, **options)
