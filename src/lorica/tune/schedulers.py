"""Which trials go on: asynchronous successive halving, the median rule, or all of them.

Times are counted in evaluations from 1, as Ray Tune counts ``training_iteration``, and the rules are Ray
Tune's, so a search decides alike whether or not Ray runs it.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy

from lorica.errors import ConfigError


class Scheduler(ABC):
    """Decides at each evaluation whether its trial ends early."""

    @abstractmethod
    def stops(self, trial: str, time: int, score: float) -> bool:
        """Whether a trial ends with this evaluation.

        Args:
            trial: its name.
            time: how many evaluations it has had, this one included.
            score: what this one gave; higher is better.
        """

    def recall(self, trial: str, time: int, score: float) -> None:
        """Count an evaluation from before a resume; its decision was made then."""
        self.stops(trial, time, score)


class RunAll(Scheduler):
    """Every trial runs to its end."""

    def stops(self, trial: str, time: int, score: float) -> bool:
        """Never."""
        return False


@dataclass
class Halving(Scheduler):
    """Asynchronous successive halving (ASHA): at each rung, a trial ends unless it is among the best so far.

    The first trial at a rung goes on: there is no other yet to compare it with.

    Args:
        grace_period: evaluations before the first rung.
        reduction_factor: the best 1/`reduction_factor` of a rung go on, and each rung is that many times as
            late as the one before.
        max_t: evaluations of a whole trial; there are no rungs from there on.

    Source:
        Li et al., A System for Massively Parallel Hyperparameter Tuning (2020), algorithm 2; the cutoff is
        the quantile that Ray Tune's AsyncHyperBandScheduler takes.
    """

    grace_period: int = 1
    reduction_factor: float = 2.0
    max_t: int = 100
    rungs: dict[float, dict[str, float]] = field(init=False)
    """Rung → trial → its score there. A rung between two evaluations is reached with the later one."""

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
        """Whether it falls short at the latest rung that it has reached."""
        if not math.isfinite(score):
            return True
        for rung in sorted(self.rungs, reverse=True):
            scores = self.rungs[rung]
            if time >= rung and trial not in scores:
                # The first at a rung, and those as good as the best of it, go on.
                share = 100 * (1 - 1 / self.reduction_factor)
                short = bool(scores) and score < float(numpy.percentile(list(scores.values()), share))
                scores[trial] = score
                return short
        return False


@dataclass
class Median(Scheduler):
    """A trial ends when its best score is worse than the median of the others' running averages.

    Args:
        grace_period: evaluations from which on it can; the averages are from there on too.
        min_samples: others that must have come as far.

    Source:
        Golovin et al., Google Vizier (2017), section 3.2.2; the averages are those that Ray Tune's
        MedianStoppingRule takes.
    """

    grace_period: int = 1
    min_samples: int = 3
    _scores: dict[str, list[float]] = field(default_factory=dict, init=False)

    def stops(self, trial: str, time: int, score: float) -> bool:
        """Whether its best is below the others' median."""
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


SCHEDULERS = ("asha", "median", "none")
