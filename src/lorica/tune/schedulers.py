"""Decide which trial is better, and which ones end early: by successive halving (ASHA) or the median rule.

Time is counted in evaluations from 1, as Ray Tune counts ``training_iteration``. The rules are Ray Tune's, so
a search makes the same decisions with and without Ray.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy

from lorica.errors import ConfigError
from lorica.train import presets, tasks
from lorica.train.recipe import Recipe
from lorica.train.trainer.arguments import LOWER_IS_BETTER
from lorica.tune.journal import Evaluation, Journal, Record, Status, score_of
from lorica.tune.settings import SearchConfig

GREATER = "greater_is_better"
"""The argument of transformers that says whether a higher metric is better."""


class Scheduler(ABC):
    """Decides at each evaluation whether its trial ends early."""

    @abstractmethod
    def stops(self, trial: str, time: int, score: float) -> bool:
        """Whether a trial ends with this evaluation.

        Args:
            trial: the trial's name.
            time: number of its evaluations, this one included.
            score: score of this evaluation; higher is better.
        """

    def recall(self, trial: str, time: int, score: float) -> None:
        """Take in an evaluation from before a resume, without deciding again."""
        self.stops(trial, time, score)


class RunAll(Scheduler):
    """Every trial runs to its end."""

    def stops(self, trial: str, time: int, score: float) -> bool:
        """Never."""
        return False


@dataclass
class Halving(Scheduler):
    """Asynchronous successive halving (ASHA): at each rung, a trial ends unless it is among the best so far.

    The first trial at a rung continues, since there is nothing to compare it with.

    Args:
        grace_period: evaluations before the first rung.
        reduction_factor: the best 1/`reduction_factor` of a rung continue, and each rung comes that many
            times as late as the one before.
        max_t: evaluations of a whole trial; rungs end there.

    Source:
        Li et al., A System for Massively Parallel Hyperparameter Tuning (2020), algorithm 2; the cutoff is
        the quantile that Ray Tune's AsyncHyperBandScheduler takes.
    """

    grace_period: int = 1
    reduction_factor: float = 2.0
    max_t: int = 100
    rungs: dict[float, dict[str, float]] = field(init=False)
    """Rung → trial → its score there. A rung between two evaluations counts with the later one."""

    def __post_init__(self) -> None:
        """Lay out the rungs."""
        if self.grace_period < 1 or self.max_t < self.grace_period:
            raise ConfigError(
                f"grace_period must be from 1 to max_t ({self.max_t}) evaluations, not {self.grace_period}"
            )
        if not self.reduction_factor > 1:
            raise ConfigError(f"reduction_factor must be more than 1, not {self.reduction_factor}")
        self.rungs = {}
        k = 0
        while math.ceil(rung := self.grace_period * self.reduction_factor**k) < self.max_t:
            self.rungs[rung] = {}
            k += 1

    def stops(self, trial: str, time: int, score: float) -> bool:
        """Whether the trial falls short at its latest rung."""
        if not math.isfinite(score):
            return True
        for rung in sorted(self.rungs, reverse=True):
            scores = self.rungs[rung]
            if time >= rung and trial not in scores:
                # The first at a rung continues, and so does any that equals its best.
                share = 100 * (1 - 1 / self.reduction_factor)
                short = bool(scores) and score < float(numpy.percentile(list(scores.values()), share))
                scores[trial] = score
                return short
        return False


@dataclass
class Median(Scheduler):
    """A trial ends when its best score is worse than the median of the others' running averages.

    Args:
        grace_period: evaluations before a trial can end; the averages start there too.
        min_samples: number of other trials that must have reached this time.

    Source:
        Golovin et al., Google Vizier (2017), section 3.2.2; the averages are those that Ray Tune's
        MedianStoppingRule takes.
    """

    grace_period: int = 1
    min_samples: int = 3
    _scores: dict[str, list[float]] = field(default_factory=dict, init=False)

    def stops(self, trial: str, time: int, score: float) -> bool:
        """Whether the trial's best score is below the median of the others' averages."""
        if not math.isfinite(score):
            return True
        own = self._scores.setdefault(trial, [])
        own.append(score)
        if time < self.grace_period:
            return False
        others = [
            statistics.fmean(scores[self.grace_period - 1 : time])
            for name, scores in self._scores.items()
            if name != trial and len(scores) >= time
        ]
        if len(others) < self.min_samples:
            return False
        return max(own) < statistics.median(others)


def scheduler_of(config: SearchConfig, recipe: Recipe) -> Scheduler:
    """The scheduler that a search asks for, for trials as long as a recipe's."""
    if config.scheduler == "none":
        return RunAll()
    if config.scheduler == "median":
        return Median(grace_period=config.grace_period)
    longest = config.max_t or max(evaluations(recipe) or 100, config.grace_period)
    return Halving(config.grace_period, config.reduction_factor, longest)


def evaluations(recipe: Recipe) -> int | None:
    """Number of evaluations of a trial; None where it depends on the number of rows."""
    training = recipe.training
    if training.eval_steps is None:
        return None if training.epochs is None or training.max_steps else math.ceil(training.epochs)
    return None if training.max_steps is None else training.max_steps // training.eval_steps


@dataclass(frozen=True)
class Goal:
    """The order of trials: which of two is better.

    Args:
        metric: name of a metric on the validation rows.
        mode: "max" or "min".
    """

    metric: str
    mode: str

    @classmethod
    def of(cls, recipe: Recipe) -> Goal:
        """The recipe's goal: its `metric_for_best`, or else its task's, with its ``greater_is_better``."""
        recipe = presets.apply(recipe)
        metric = (recipe.training.metric_for_best or tasks.get(recipe.task).best_metric).removeprefix("eval_")
        greater = recipe.training.arguments.get(GREATER)
        return cls(metric, mode_of(metric) if greater is None else "max" if greater else "min")

    def into(self, recipe: Recipe) -> Recipe:
        """The recipe, set to keep the best checkpoint by this goal."""
        arguments = {name: value for name, value in recipe.training.arguments.items() if name != GREATER}
        if self.mode != mode_of(self.metric):
            arguments[GREATER] = self.mode == "max"
        return recipe.replace(training={"metric_for_best": self.metric, "arguments": arguments})

    def score(self, metrics: Mapping[str, float]) -> float:
        """The metric, with its sign changed where lower is better."""
        value = score_of(metrics, self.metric)
        return value if self.mode == "max" else -value


def mode_of(metric: str) -> str:
    """Whether a higher metric is better ("max") or a lower one ("min")."""
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
        """Tell the scheduler the journal's results, if the goal is known."""
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
        """Note that a trial exists; returns its record."""
        record = self.journal.begin(name, values)
        self.recall(name, self.goal_of(recipe))
        self.on_change(record)
        return record

    def recall(self, name: str, goal: Goal) -> None:
        """Tell the scheduler, once, of a trial's evaluations in the journal."""
        if name not in self._recalled:
            self._recalled.add(name)
            for each in self.journal.record(name).evaluations:
                self.scheduler.recall(name, each.time, goal.score(each.metrics))

    def trial_started(self, name: str) -> None:
        """Note that a trial started to train."""
        self.journal.record(name).status = "running"
        self.on_change(self.journal.record(name))

    def trial_evaluated(
        self, name: str, goal: Goal, metrics: Mapping[str, float], step: int, epoch: float, seconds: float
    ) -> bool:
        """Note an evaluation; returns whether the trial must end."""
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
        """Note the end of a trial; returns its record."""
        self.journal.ended(name, status, **more)
        self.on_change(self.journal.record(name))
        return self.journal.record(name)
