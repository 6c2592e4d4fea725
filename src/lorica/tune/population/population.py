"""Many adapters trained at once, in one process, over one frozen base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica.errors import ConfigError, LoricaError
from lorica.train import presets
from lorica.train.console import make_console
from lorica.train.files import writable_directory
from lorica.train.recipe import Recipe
from lorica.tune.controller import Goal, TrialController
from lorica.tune.journal import JOURNAL, TRIALS, Journal, Record
from lorica.tune.population.runner import TrialRunner
from lorica.tune.progress import ProgressTable
from lorica.tune.schedulers import Scheduler


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
        console: Console | None = None,
        on_end: Callable[[Record], None] | None = None,
    ) -> None:
        """Check what can be checked; nothing is loaded yet."""
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
