"""What the log of a run says of its speed and memory, for TensorBoard and every other tracker."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor

from lorica.train.memory import peak_memory

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object


class MeasuringMixin(_Base):
    """Adds ``tokens_per_second``, padding apart, and ``peak_memory_gb`` to entries with a training loss."""

    _since: tuple[float, int] | None = None

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """A step of training, from the first of which time is measured."""
        if self._since is None:
            self._since = time.perf_counter(), int(self.state.num_input_tokens_seen)
        return super().training_step(*args, **options)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log; see transformers' Trainer."""
        if "loss" in logs and self._since is not None:
            began, seen = self._since
            self._since = time.perf_counter(), int(self.state.num_input_tokens_seen)
            logs["tokens_per_second"] = round((self._since[1] - seen) / max(self._since[0] - began, 1e-9), 1)
            logs["peak_memory_gb"] = round(peak_memory() / 1e9, 3)
        super().log(logs, *args, **options)
