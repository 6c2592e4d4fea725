"""Between the steps: progress is shown, checkpoints fall where a resume is exact, Ctrl-C is heard."""

from __future__ import annotations

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica.train.console import duration
from lorica.train.distributed.group import any_of, world
from lorica.train.trainer.scoring import Scoring


class CheckpointCallback(TrainerCallback):
    """Writes checkpoints where a run can be taken up as if it had never stopped.

    One is written after each evaluation (by transformers' own rule), every `save_steps`, and when the user
    interrupts. Those that would fall on an epoch's last step wait for the evaluation at the epoch's end: a
    run resumed from before
    it would never make it.

    Where several processes train, all of them stop after the step in which one was asked to.

    Args:
        save_steps: steps between checkpoints, or None.
    """

    def __init__(self, save_steps: int | None = None) -> None:
        """Nothing is due yet."""
        self.save_steps = save_steps
        self.asked = self.interrupted = False
        self._due = False

    def interrupt(self) -> None:
        """Ask for a checkpoint and the end of training after the present step."""
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save if a step's count or the user says so."""
        self.interrupted = any_of(self.asked)
        if self.save_steps is not None and state.global_step % self.save_steps == 0:
            control.should_save = True
        at_end = state.epoch == int(state.epoch)
        if at_end or control.should_training_stop:
            self._due, control.should_save = control.should_save, False
        elif self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save the waiting checkpoint; an epoch cut short by the user is not evaluated or saved again."""
        whole = state.epoch == int(state.epoch)
        if self.interrupted and not whole:
            control.should_evaluate = control.should_save = control.should_log = False
        elif self._due or self.interrupted:
            control.should_save = True
        self._due = False
        control.should_training_stop |= self.interrupted


@contextlib.contextmanager
def interruptible(callback: CheckpointCallback, console: Console) -> Iterator[None]:
    """Save and stop at the first Ctrl-C, stop at once at the second.

    A launcher passes on to its processes what a terminal has sent to them already: within a second, several
    signals are one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's; elsewhere they are somebody else's to handle
        return

    heard = 0.0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if callback.asked:
            if world() > 1 and time.monotonic() - heard < 1:
                return
            raise KeyboardInterrupt
        heard = time.monotonic()
        callback.interrupt()
        console.print("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class ProgressCallback(TrainerCallback):
    """Shows step, loss, tokens or samples per second and the time left; keeps the time of each step.

    Args:
        console: where to show it.
        title: name of the run.
        metric: that decides which evaluation is the best, where the trainer's arguments name none.
        scoring: notes whether all rows are called the same, or None.
        beats: score by that metric of calling every row the most frequent class, or None.
    """

    def __init__(
        self,
        console: Console,
        title: str = "train",
        metric: str = "loss",
        scoring: Scoring | None = None,
        beats: float | None = None,
    ) -> None:
        """Show nothing yet."""
        self.console = console
        self.title = title
        self.metric = metric
        self.scoring = scoring
        self.beats = beats
        self.step_seconds: list[float] = []
        self._progress: Progress | None = None
        self._loss = "loss -"
        self._last_line = 0.0
        self._began = self._step_began = 0.0
        self._first_step = self._first_learned = 0
        self._model: Any = None

    @property
    def median_step_seconds(self) -> float | None:
        """Median seconds per step, the first three left out as warm-up."""
        timed = self.step_seconds[3:] or self.step_seconds
        return statistics.median(timed) if timed else None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Start the clock and, on a terminal, the line that moves."""
        self._model, self._began, self._first_step = model, time.perf_counter(), state.global_step
        self._first_learned = learned(model, args, state)
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                console=self.console,
                transient=True,
            )
            self._progress.add_task(self.title, total=state.max_steps, completed=state.global_step, line="")
            self._progress.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start timing a step."""
        self._step_began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop timing it, and move the line on."""
        self.step_seconds.append(time.perf_counter() - self._step_began)
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], completed=state.global_step, line=self._line(args, state)
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Take up the loss; into a pipe, write a line every few seconds."""
        if logs is None or "loss" not in logs:
            return
        # Where answers are rewarded, the loss says nothing.
        shown = "reward" if "reward" in logs else "loss"
        self._loss = f"{shown} {float(logs[shown]):.4f}"
        now = time.perf_counter()
        if self._progress is None and (now - self._last_line >= 5 or state.global_step >= state.max_steps):
            self._last_line = now
            self.console.print(f"{self.title}  {self._line(args, state)}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write a line for each evaluation; the metric that decides the best comes first."""
        shown = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        deciding = (args.metric_for_best_model or self.metric).removeprefix("eval_")
        kept = [name for name in dict.fromkeys([deciding, "loss", "accuracy", "f1"]) if name in shown]
        parts = [f"{name} {shown[name]:.4f}" for name in kept]
        if self.beats is not None and deciding in shown:
            parts[0] += f" (largest class {self.beats:.4f})"
        same = self.scoring.only if self.scoring is not None else None
        called = "" if same is None else f"; all rows are called {same!r}"
        line = f"{self.title}  epoch {state.epoch:.2f}  validation: {'  '.join(parts)}{called}"
        self.console.print(line, markup=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the line away."""
        self.close()

    def close(self) -> None:
        """Take the line away, also when training ended with an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _line(self, args: TrainingArguments, state: TrainerState) -> str:
        elapsed, done = time.perf_counter() - self._began, state.global_step - self._first_step
        pace = (learned(self._model, args, state) - self._first_learned) / max(elapsed, 1e-9)
        left = elapsed / max(done, 1) * (state.max_steps - state.global_step)
        step = f"step {state.global_step}/{state.max_steps}"
        return f"{step}  {self._loss}  {pace:,.0f} {unit(self._model)}/s  ETA {duration(left)}"


def learned(model: Any, args: TrainingArguments, state: TrainerState) -> int:
    """The amount that a run has learned from so far, in `unit`: tokens without padding, or rows."""
    if unit(model) == "tokens":
        return int(state.num_input_tokens_seen)
    return state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def unit(model: Any) -> Literal["tokens", "samples"]:
    """The unit of a run's speed: "tokens" for models that read them, else "samples" (images, sound)."""
    return "tokens" if getattr(model, "main_input_name", "input_ids") == "input_ids" else "samples"
