"""Which trial is better, and which trials end early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorica.train import presets, tasks
from lorica.train.arguments import LOWER_IS_BETTER
from lorica.train.recipe import Recipe
from lorica.tune.journal import Evaluation, Journal, Record, Status, score_of
from lorica.tune.schedulers import RunAll, Scheduler

GREATER = "greater_is_better"
"""Transformers' argument that says what its name does not: which way a metric goes."""


@dataclass(frozen=True)
class Goal:
    """What makes one trial better than another.

    Args:
        metric: name of a metric on the validation rows.
        mode: "max" or "min".
    """

    metric: str
    mode: str

    @classmethod
    def of(cls, recipe: Recipe) -> Goal:
        """A recipe's own: its `metric_for_best`, or its task's; and what it says of ``greater_is_better``."""
        recipe = presets.apply(recipe)
        metric = (recipe.training.metric_for_best or tasks.get(recipe.task).best_metric).removeprefix("eval_")
        greater = recipe.training.arguments.get(GREATER)
        return cls(metric, mode_of(metric) if greater is None else "max" if greater else "min")

    def into(self, recipe: Recipe) -> Recipe:
        """A recipe whose best checkpoint is the best by this goal."""
        arguments = {name: value for name, value in recipe.training.arguments.items() if name != GREATER}
        if self.mode != mode_of(self.metric):
            arguments[GREATER] = self.mode == "max"
        return recipe.replace(training={"metric_for_best": self.metric, "arguments": arguments})

    def score(self, metrics: Mapping[str, float]) -> float:
        """The metric, such that higher is better."""
        value = score_of(metrics, self.metric)
        return value if self.mode == "max" else -value


def mode_of(metric: str) -> str:
    """Whether more of a metric is better ("max") or less ("min")."""
    return "min" if metric in LOWER_IS_BETTER else "max"


class TrialController:
    """Keeps the journal of a search, and asks its scheduler which trials end early.

    Args:
        journal: the file of evaluations and ends.
        scheduler: decides which trials end early. None lets all finish.
        goal: metric that the scheduler compares. None takes each recipe's own.
        on_change: called with a trial's record after each change.
    """

    def __init__(
        self,
        journal: Journal,
        scheduler: Scheduler | None = None,
        goal: Goal | None = None,
        on_change: Callable[[Record], None] = lambda record: None,
    ) -> None:
        """Recall what the journal holds, where the goal is known."""
        self.journal = journal
        self.scheduler = scheduler or RunAll()
        self.goal = goal
        self.on_change = on_change
        self._recalled: set[str] = set()
        if goal is not None:
            for name in journal.records:
                self.recall(name, goal)

    def goal_of(self, recipe: Recipe) -> Goal:
        """The goal of a recipe."""
        return self.goal or Goal.of(recipe)

    def trial_created(self, name: str, recipe: Recipe, values: Mapping[str, object]) -> Record:
        """A trial exists; returns its record."""
        record = self.journal.begin(name, values)
        self.recall(name, self.goal_of(recipe))
        self.on_change(record)
        return record

    def recall(self, name: str, goal: Goal) -> None:
        """Tell the scheduler of the evaluations that the journal holds of a trial, once."""
        if name not in self._recalled:
            self._recalled.add(name)
            for each in self.journal.record(name).evaluations:
                self.scheduler.recall(name, each.time, goal.score(each.metrics))

    def trial_started(self, name: str) -> None:
        """A trial started to train."""
        self.journal.record(name).status = "running"
        self.on_change(self.journal.record(name))

    def trial_evaluated(
        self, name: str, goal: Goal, metrics: Mapping[str, float], step: int, epoch: float, seconds: float
    ) -> bool:
        """A trial was evaluated; returns whether it must end."""
        record = self.journal.record(name)
        known = next((each for each in record.evaluations if each.step == step), None)
        if known is not None:  # made again, after a resume from before it
            return known.stops
        time = len(record.evaluations) + 1
        stops = self.scheduler.stops(name, time, goal.score(metrics))
        self.journal.evaluated(name, Evaluation(time, step, epoch, dict(metrics), round(seconds, 3), stops))
        self.on_change(record)
        return stops

    def trial_ended(self, name: str, status: Status, **more: object) -> Record:
        """A trial ended; returns its record."""
        self.journal.ended(name, status, **more)
        self.on_change(self.journal.record(name))
        return self.journal.record(name)
