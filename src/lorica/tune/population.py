"""Many adapters trained at once, in one process, over one frozen base."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica.errors import ConfigError, LoricaError
from lorica.train.checkpoints import last_checkpoint
from lorica.train.console import make_console
from lorica.train.files import writable_directory
from lorica.train.preparing import Prepared, prepare
from lorica.train.quiet import quiet
from lorica.train.recipe import Recipe
from lorica.train.run import Result, train_prepared
from lorica.train.trainer import Trainer
from lorica.tune.base import SharedBase
from lorica.tune.board import Board
from lorica.tune.halving import Scheduler
from lorica.tune.joining import base_of, why_alone
from lorica.tune.journal import ENDED, Journal, Record
from lorica.tune.lockstep import LAST, Lane, Lockstep
from lorica.tune.referee import Goal, Referee
from lorica.tune.twin import join_layers

JOURNAL = "results.jsonl"
TRIALS = "trials"
LOG = "log.txt"


class Dropped(Exception):
    """Ends a trial that the scheduler sends away."""


class JointTrainer(Trainer):
    """The trainer of one lane: it waits for the others before a step, at the layers, and to go backward."""

    def __init__(self, *args: Any, lane: Lane[Any], places: Mapping[str, int], **options: Any) -> None:
        """Join the model's layers."""
        super().__init__(*args, **options)
        self.lane = lane
        model: Any = self.model
        join_layers(model, lane, places, apart=model.get_output_embeddings())
        vars(self.accelerator)["backward"] = self._backward

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """A step of training, along with the other lanes'."""
        self.lane.begin_step()
        return super().training_step(*args, **options)

    def _backward(self, loss: Tensor) -> None:
        self.lane.meet(LAST, loss / self.accelerator.gradient_accumulation_steps)


class Population:
    """Trains many recipes at once over one base, each with the result that it would have alone.

    The trials' batches go through the base together: one product with each frozen weight for the rows of all,
    a segment of low-rank arithmetic for each, one backward pass. Everything else is each trial's own, and is
    what `lorica.train.train` does: model and head, rows and their order, dropout, clipping, optimizer,
    schedule, validation, checkpoints, early stopping. So results are those of training alone, but for the
    last bits that a product over more rows may round otherwise.

    Recipes may differ in `method`, `baseline` and `training`. Those on another base follow once the first are
    through. Those that change how the base is computed (a quantized base, fp16, gradient checkpointing) are
    trained by themselves, and a line says so.

    Args:
        recipes: what to train, by name or in order; or an iterator of names and recipes, asked for the next
            when a slot is free. Their `output` is not looked at.
        directory: folder for ``results.jsonl``, and for what `lorica.train.train` writes of each trial, under
            ``trials/``.
        slots: trials at once. Each costs its adapter, gradients, optimizer and activations.
        scheduler: who leaves before the end. None lets all finish.
        goal: metric that the scheduler looks at. None takes the recipes' own.
        values: trial and recipe → what to show of it in tables. None shows nothing.
        console: where to show progress. None makes one.
        told: called with a trial's record when it ends.

    Raises:
        ConfigError: no slot.
    """

    def __init__(
        self,
        recipes: Mapping[str, Recipe] | Sequence[Recipe] | Iterator[tuple[str, Recipe]],
        directory: str | Path,
        *,
        slots: int = 8,
        scheduler: Scheduler | None = None,
        goal: Goal | None = None,
        values: Callable[[str, Recipe], Mapping[str, Any]] | None = None,
        console: Console | None = None,
        told: Callable[[Record], None] | None = None,
    ) -> None:
        """Check what can be checked; nothing is loaded yet."""
        if slots < 1:
            raise ConfigError(f"slots must be at least 1, not {slots}")
        if isinstance(recipes, Sequence):
            recipes = {f"{i:03d}": recipe for i, recipe in enumerate(recipes)}
        self._source = iter(recipes.items()) if isinstance(recipes, Mapping) else recipes
        self.directory = Path(directory)
        self.slots = slots
        self.journal = Journal(self.directory / JOURNAL)
        self._values = values or (lambda name, recipe: {})
        self._told = told or (lambda record: None)
        self._console = console or make_console()
        self._board = Board(self._console)
        self._referee = Referee(self.journal, scheduler, goal, self._board.show)
        self._resume = False
        self._elsewhere: deque[tuple[str, Recipe]] = deque()
        self._alone: deque[tuple[str, Recipe]] = deque()

    def folder(self, name: str) -> Path:
        """A trial's own folder."""
        return self.directory / TRIALS / name

    def run(self, *, resume: bool = False, until: Callable[[], bool] = lambda: False) -> list[Record]:
        """Train them all.

        Args:
            resume: go on in a folder that holds a part of the trials: those that ended stay as they are, the
                others go on from their newest checkpoints.
            until: asked before every step; once it says so, no more is trained. What has not ended by then
                can be resumed.

        Returns:
            A record of each trial, of those that failed too.

        Raises:
            LoricaError: the folder holds trials already, or cannot be written.
        """
        if self.journal.records and not resume:
            raise LoricaError(
                f"{self.directory} holds trials already ({len(self.journal.records)}); resume them, or "
                "choose another folder"
            )
        writable_directory(self.directory)
        self._resume = resume
        source: Iterator[tuple[str, Recipe]] | None = self._source
        with self._board:
            while source is not None and not until():
                self._train_joint(source, until)
                source = iter(list(self._elsewhere)) if self._elsewhere else None
                self._elsewhere.clear()
            while self._alone and not until():
                self._train_alone(*self._alone.popleft())
        return list(self.journal.records.values())

    def _train_joint(self, source: Iterator[tuple[str, Recipe]], until: Callable[[], bool]) -> None:
        base = None
        with Lockstep() as lockstep, quiet():
            while True:
                while len(lockstep.lanes) < self.slots and (trial := self._next(source, base)) is not None:
                    base = base or SharedBase(trial[1])
                    lockstep.add(self._lane(base, *trial))
                if not lockstep.lanes or until():
                    return
                for lane in lockstep.advance():
                    self._close(lane.name, lane.result, lane.error)

    def _next(
        self, source: Iterator[tuple[str, Recipe]], base: SharedBase | None
    ) -> tuple[str, Recipe] | None:
        """The next trial on this base; others are put aside."""
        for name, recipe in source:
            if self._referee.begins(name, recipe, self._values(name, recipe)).status in ENDED:
                continue
            reason = why_alone(recipe)
            if reason is not None:
                self._board.note(f"trial {name} is trained by itself: {reason}")
                self._alone.append((name, recipe))
            elif base is not None and base_of(recipe) != base.key:
                self._board.note(f"trial {name} has another task, model or data, and comes later")
                self._elsewhere.append((name, recipe))
            else:
                return name, recipe
        return None

    def _lane(self, base: SharedBase, name: str, recipe: Recipe) -> Lane[Result]:
        def work(lane: Lane[Result]) -> Result:
            own = base.prepared(recipe)
            trainer = partial(JointTrainer, lane=lane, places=base.places)
            return self._train(name, recipe, own, make_trainer=trainer)

        return Lane(name, work)

    def _train_alone(self, name: str, recipe: Recipe) -> None:
        result = error = None
        try:
            result = self._train(name, recipe, prepare(recipe))
        except Exception as raised:
            error = raised
        self._close(name, result, error)

    def _train(self, name: str, recipe: Recipe, prepared: Prepared, **options: Any) -> Result:
        folder = writable_directory(self.folder(name))
        self._referee.runs(name)
        prepared = dataclasses.replace(prepared, recipe=prepared.recipe.replace(output=str(folder)))
        reporter = Reporter(partial(self._referee.evaluated, name, self._referee.goal_of(recipe)))
        # A trial that has nothing to go on from starts as new, its warm start and all.
        begun = self._resume and last_checkpoint(folder / "checkpoints") is not None
        with (folder / LOG).open("a", encoding="utf-8") as log:
            return train_prepared(
                prepared,
                resume=begun,
                overwrite=not begun,
                console=Console(file=log, width=200, no_color=True),
                callbacks=[reporter],
                hear_interrupts=False,
                **options,
            )

    def _close(self, name: str, result: Result | None, error: Exception | None) -> None:
        if result is not None:
            record = self._referee.ends(name, "finished", metrics=result.metrics)
        elif isinstance(error, Dropped):
            record = self._referee.ends(name, "stopped")
        else:
            assert error is not None
            write_error(self.folder(name), error)
            record = self._referee.ends(name, "failed", error=f"{type(error).__name__}: {error}")
        self._told(record)


def write_error(folder: Path, error: Exception) -> None:
    """Add an error, and where it came from, to a trial's log."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(error)))


class Reporter(TrainerCallback):
    """Tells of each evaluation, and ends the trial if that is the answer."""

    def __init__(self, tell: Callable[[dict[str, float], int, float, float], bool]) -> None:
        self._tell = tell
        self._began = time.perf_counter()
        self._parameters = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Count what trains."""
        self._parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Pass the scores on, and how much trains beside them."""
        timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        named = {key.removeprefix("eval_"): float(value) for key, value in (metrics or {}).items()}
        scores = {key: value for key, value in named.items() if key not in timing and key != "epoch"}
        scores["parameters"] = self._parameters
        if self._tell(scores, state.global_step, state.epoch or 0.0, time.perf_counter() - self._began):
            raise Dropped
