"""Many adapters trained at once, in one process, over one frozen base."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import rich.console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica.errors import ConfigError, LoricaError
from lorica.train import presets
from lorica.train.console import Console, make_console, quiet
from lorica.train.prepared import Prepared, prepare
from lorica.train.recipe import Recipe
from lorica.train.run import Result, train_prepared
from lorica.train.system import writable_directory
from lorica.train.trainer.checkpoints import last_checkpoint
from lorica.train.trainer.fit import logged_scores
from lorica.train.trainer.trainer import Trainer
from lorica.tune.journal import ENDED, JOURNAL, TRIALS, Journal, Record, Status
from lorica.tune.population.coroutines import BACKWARD, Coroutine, CoroutineGroup
from lorica.tune.population.joint_layers import join_layers
from lorica.tune.population.shared_base import SharedBase, base_of, why_alone
from lorica.tune.progress import ProgressTable
from lorica.tune.schedulers import Goal, Scheduler, TrialController

LOG = "log.txt"


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
        values: trial and recipe → its columns in tables. None shows none.
        console: where to show progress. None makes one.
        on_end: called with a trial's record when it ends.

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
        console: rich.console.Console | None = None,
        on_end: Callable[[Record], None] | None = None,
    ) -> None:
        """Check the settings; nothing is loaded yet."""
        if slots < 1:
            raise ConfigError(f"slots must be at least 1, not {slots}")
        if isinstance(recipes, Sequence):
            recipes = {f"{i:03d}": recipe for i, recipe in enumerate(recipes)}
        known: dict[str, Recipe] = {}
        if isinstance(recipes, Mapping):
            known = {name: presets.apply(recipe) for name, recipe in recipes.items()}
            recipes = iter(known.items())
        self._source = ((name, presets.apply(recipe)) for name, recipe in recipes)
        self.directory = Path(directory)
        self.slots = slots
        self.journal = Journal(self.directory / JOURNAL)
        self._values = values or (lambda name, recipe: {})
        self._on_end = on_end or (lambda record: None)
        self._progress = ProgressTable(console or make_console())
        self._controller = TrialController(self.journal, scheduler, goal, self._progress.show)
        for name in self.journal.records:
            if name in known:
                self._controller.recall(name, self._controller.goal_of(known[name]))

    def folder(self, name: str) -> Path:
        """A trial's own folder."""
        return self.directory / TRIALS / name

    def run(self, *, resume: bool = False, until: Callable[[], bool] = lambda: False) -> list[Record]:
        """Train them all.

        Args:
            resume: go on in a folder that holds a part of the trials: those that ended stay as they are, the
                others continue from their newest checkpoints.
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
        runner = TrialRunner(
            self._controller,
            self.folder,
            slots=self.slots,
            resume=resume,
            values=self._values,
            note=self._progress.note,
            on_end=self._on_end,
        )
        with self._progress:
            runner.run(self._source, until)
        return list(self.journal.records.values())


class Controller(Protocol):
    """The receiver of a runner's reports: a `TrialController`, or a proxy of one in another process."""

    def trial_created(self, name: str, recipe: Recipe, values: Mapping[str, object]) -> Record:
        """A trial exists; returns its record."""
        ...

    def trial_started(self, name: str) -> None:
        """A trial started to train."""
        ...

    def goal_of(self, recipe: Recipe) -> Goal:
        """The goal of a recipe."""
        ...

    def trial_evaluated(
        self, name: str, goal: Goal, metrics: Mapping[str, float], step: int, epoch: float, seconds: float
    ) -> bool:
        """A trial was evaluated; returns whether it must end."""
        ...

    def trial_ended(self, name: str, status: Status, **more: object) -> Record:
        """A trial ended."""
        ...


class TrialStopped(Exception):
    """Ends a trial that the scheduler stops."""


class JointTrainer(Trainer):
    """The trainer of one trial; it waits for the others before a step, at each layer and before backward."""

    def __init__(
        self, *args: Any, coroutine: Coroutine[Any], places: Mapping[str, int], **options: Any
    ) -> None:
        """Join the model's layers."""
        super().__init__(*args, **options)
        self.coroutine = coroutine
        model: Any = self.model
        join_layers(model, coroutine, places, apart=model.get_output_embeddings())
        vars(self.accelerator)["backward"] = self._backward
        if hasattr(model, "num_parameters"):
            # Asked for at every step, and counted by a walk over all modules.
            vars(model)["num_parameters"] = functools.cache(model.num_parameters)

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """A step of training, along with the other coroutines'."""
        self.coroutine.begin_step()
        return super().training_step(*args, **options)

    def _backward(self, loss: Tensor) -> None:
        self.coroutine.synchronize(BACKWARD, loss / self.accelerator.gradient_accumulation_steps)


class TrialRunner:
    """Trains recipes, together where they can share a base.

    Args:
        controller: decides which trials end early, and keeps the journal.
        folder: trial → its own folder.
        slots: trials at once.
        base: rows and weights that are loaded already. None loads them.
        resume: continue from the newest checkpoints where there are some.
        values: trial and recipe → its columns in tables.
        note: says a line to the user.
        on_end: called with a trial's record when it ends.
    """

    def __init__(
        self,
        controller: Controller,
        folder: Callable[[str], Path],
        *,
        slots: int,
        base: SharedBase | None = None,
        resume: bool = False,
        values: Callable[[str, Recipe], Mapping[str, Any]] = lambda name, recipe: {},
        note: Callable[[str], None] = lambda line: None,
        on_end: Callable[[Record], None] = lambda record: None,
    ) -> None:
        """Nothing is loaded yet."""
        self._controller, self._folder, self._slots = controller, folder, slots
        self._base, self._resume = base, resume
        self._values, self._note, self._on_end = values, note, on_end
        self._elsewhere: deque[tuple[str, Recipe]] = deque()
        self._alone: deque[tuple[str, Recipe]] = deque()

    def run(self, source: Iterator[tuple[str, Recipe]], until: Callable[[], bool] = lambda: False) -> None:
        """Train all that the source gives, asked for the next when a slot is free.

        Args:
            source: names and recipes.
            until: asked before every step; once it says so, no more is trained.
        """
        more: Iterator[tuple[str, Recipe]] | None = source
        with _frozen_garbage():
            while more is not None and not until():
                self._train_joint(more, until)
                more = iter(list(self._elsewhere)) if self._elsewhere else None
                self._elsewhere.clear()
            while self._alone and not until():
                self._train_alone(*self._alone.popleft())

    def _train_joint(self, source: Iterator[tuple[str, Recipe]], until: Callable[[], bool]) -> None:
        base = None
        with CoroutineGroup() as group, quiet():
            while True:
                while len(group.coroutines) < self._slots and (trial := self._next(source, base)) is not None:
                    base = base or self._known(trial[1]) or SharedBase(trial[1])
                    group.add(self._coroutine(base, *trial))
                if not group.coroutines or until():
                    return
                for coroutine in group.advance():
                    self._close(coroutine.name, coroutine.result, coroutine.error)

    def _next(
        self, source: Iterator[tuple[str, Recipe]], base: SharedBase | None
    ) -> tuple[str, Recipe] | None:
        """The next trial on this base; others are put aside."""
        for name, recipe in source:
            if self._controller.trial_created(name, recipe, self._values(name, recipe)).status in ENDED:
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

    def _coroutine(self, base: SharedBase, name: str, recipe: Recipe) -> Coroutine[Result]:
        def work(coroutine: Coroutine[Result]) -> Result:
            own = base.prepared(recipe)
            trainer = partial(JointTrainer, coroutine=coroutine, places=base.places)
            return self._train(name, recipe, own, make_trainer=trainer)

        return Coroutine(name, work)

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
        self._controller.trial_started(name)
        prepared = dataclasses.replace(prepared, recipe=prepared.recipe.replace(output=str(folder)))
        reporter = Reporter(partial(self._controller.trial_evaluated, name, self._controller.goal_of(recipe)))
        # A trial that has nothing to continue from starts as new, its warm start and all.
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
            record = self._controller.trial_ended(name, "finished", metrics=result.metrics)
        elif isinstance(error, TrialStopped):
            record = self._controller.trial_ended(name, "stopped")
        else:
            assert error is not None
            folder = self._folder(name)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOG).open("a", encoding="utf-8") as log:
                log.write("".join(traceback.format_exception(error)))
            record = self._controller.trial_ended(name, "failed", error=f"{type(error).__name__}: {error}")
        self._on_end(record)


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Hide existing objects from the garbage collector: each trainer that starts makes it visit them all."""
    if gc.get_freeze_count():  # the caller froze it already
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Reporter(TrainerCallback):
    """Reports each evaluation to the controller, and ends the trial if it must end."""

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
        """Count the trained parameters."""
        self._parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Report the scores, and the number of trained parameters."""
        scores = logged_scores(metrics or {}, "eval_")
        scores["parameters"] = self._parameters
        if self._tell(scores, state.global_step, state.epoch or 0.0, time.perf_counter() - self._began):
            raise TrialStopped
