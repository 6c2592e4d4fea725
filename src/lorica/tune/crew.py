"""Trials trained side by side in one process, whoever decides on them and wherever that is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica.train.checkpoints import last_checkpoint
from lorica.train.files import writable_directory
from lorica.train.fitting import logged_scores
from lorica.train.preparing import Prepared, prepare
from lorica.train.quiet import quiet
from lorica.train.recipe import Recipe
from lorica.train.run import Result, train_prepared
from lorica.train.trainer import Trainer
from lorica.tune.base import SharedBase
from lorica.tune.joining import base_of, why_alone
from lorica.tune.journal import ENDED, Record, Status
from lorica.tune.lockstep import LAST, Lane, Lockstep
from lorica.tune.referee import Goal
from lorica.tune.twin import join_layers

LOG = "log.txt"


class Decides(Protocol):
    """What a crew asks and tells: `Referee`, or one that passes it on to another process."""

    def begins(self, name: str, recipe: Recipe, values: Mapping[str, object]) -> Record:
        """A trial exists; what is known of it."""
        ...

    def runs(self, name: str) -> None:
        """A trial is under way."""
        ...

    def goal_of(self, recipe: Recipe) -> Goal:
        """What counts for a recipe."""
        ...

    def evaluated(
        self, name: str, goal: Goal, metrics: Mapping[str, float], step: int, epoch: float, seconds: float
    ) -> bool:
        """A trial was evaluated; whether it ends with that."""
        ...

    def ends(self, name: str, status: Status, **more: object) -> Record:
        """A trial ended."""
        ...


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
        if hasattr(model, "num_parameters"):
            # Asked for at every step, and counted by a walk over all modules.
            vars(model)["num_parameters"] = functools.cache(model.num_parameters)

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """A step of training, along with the other lanes'."""
        self.lane.begin_step()
        return super().training_step(*args, **options)

    def _backward(self, loss: Tensor) -> None:
        self.lane.meet(LAST, loss / self.accelerator.gradient_accumulation_steps)


class Crew:
    """Trains recipes as they come, those that can be joint together.

    Args:
        referee: who decides on them, and writes down what becomes of them.
        folder: trial → its own folder.
        slots: trials at once.
        base: rows and weights that are loaded already, for recipes on that base. None loads them.
        resume: go on from the newest checkpoints where there are some.
        values: trial and recipe → what to show of it in tables.
        note: says a line to the user.
        told: called with a trial's record when it ends.
    """

    def __init__(
        self,
        referee: Decides,
        folder: Callable[[str], Path],
        *,
        slots: int,
        base: SharedBase | None = None,
        resume: bool = False,
        values: Callable[[str, Recipe], Mapping[str, Any]] = lambda name, recipe: {},
        note: Callable[[str], None] = lambda line: None,
        told: Callable[[Record], None] = lambda record: None,
    ) -> None:
        """Nothing is loaded yet."""
        self._referee, self._folder, self._slots = referee, folder, slots
        self._base, self._resume = base, resume
        self._values, self._note, self._told = values, note, told
        self._elsewhere: deque[tuple[str, Recipe]] = deque()
        self._alone: deque[tuple[str, Recipe]] = deque()

    def run(self, source: Iterator[tuple[str, Recipe]], until: Callable[[], bool] = lambda: False) -> None:
        """Train all that the source gives, asked for the next when a slot is free.

        Args:
            source: names and recipes.
            until: asked before every step; once it says so, no more is trained.
        """
        more: Iterator[tuple[str, Recipe]] | None = source
        with _settled():
            while more is not None and not until():
                self._train_joint(more, until)
                more = iter(list(self._elsewhere)) if self._elsewhere else None
                self._elsewhere.clear()
            while self._alone and not until():
                self._train_alone(*self._alone.popleft())

    def _train_joint(self, source: Iterator[tuple[str, Recipe]], until: Callable[[], bool]) -> None:
        base = None
        with Lockstep() as lockstep, quiet():
            while True:
                while len(lockstep.lanes) < self._slots and (trial := self._next(source, base)) is not None:
                    base = base or self._known(trial[1]) or SharedBase(trial[1])
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
                self._note(f"trial {name} is trained by itself: {reason}")
                self._alone.append((name, recipe))
            elif base is not None and base_of(recipe) != base.key:
                self._note(f"trial {name} has another task, model or data, and comes later")
                self._elsewhere.append((name, recipe))
            else:
                return name, recipe
        return None

    def _known(self, recipe: Recipe) -> SharedBase | None:
        """The base that was loaded before, if it is this recipe's."""
        same = self._base is not None and self._base.key == base_of(recipe) and recipe.quantization is None
        return self._base if same else None

    def _lane(self, base: SharedBase, name: str, recipe: Recipe) -> Lane[Result]:
        def work(lane: Lane[Result]) -> Result:
            own = base.prepared(recipe)
            trainer = partial(JointTrainer, lane=lane, places=base.places)
            return self._train(name, recipe, own, make_trainer=trainer)

        return Lane(name, work)

    def _train_alone(self, name: str, recipe: Recipe) -> None:
        result = error = None
        base = self._known(recipe)
        try:
            result = self._train(name, recipe, prepare(recipe) if base is None else base.prepared(recipe))
        except Exception as raised:
            error = raised
        self._close(name, result, error)

    def _train(self, name: str, recipe: Recipe, prepared: Prepared, **options: Any) -> Result:
        folder = writable_directory(self._folder(name))
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
            folder = self._folder(name)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOG).open("a", encoding="utf-8") as log:
                log.write("".join(traceback.format_exception(error)))
            record = self._referee.ends(name, "failed", error=f"{type(error).__name__}: {error}")
        self._told(record)


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Keep the garbage collector off what is there already: a trainer that starts sends it through all."""
    if gc.get_freeze_count():  # someone else's choice
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
        scores = logged_scores(metrics or {}, "eval_")
        scores["parameters"] = self._parameters
        if self._tell(scores, state.global_step, state.epoch or 0.0, time.perf_counter() - self._began):
            raise Dropped
