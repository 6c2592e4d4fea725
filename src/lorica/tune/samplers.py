"""Choose the next trial's values: at random, on a grid, or where Optuna's TPE expects the best score."""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from lorica.errors import ConfigError, nearest, require
from lorica.tune.space import Dimension, Space

ALGORITHMS = ("random", "tpe", "grid")


class Sampler(ABC):
    """Chooses the values of trials.

    Trial n depends on the seed, on n and on the earlier trials' scores alone, so a search can be resumed.

    Attributes:
        size: number of trials; infinite for samplers that can always draw another.
    """

    size: float = math.inf

    def __init__(self, space: Space, seed: int) -> None:
        """Keep the space."""
        self.space = space
        self.seed = seed

    @abstractmethod
    def values(self, index: int) -> dict[str, Any] | None:
        """Values of the searched fields for trial `index`, counted from 0; None after the last."""

    def take_up(self, values: Mapping[str, Any]) -> None:  # noqa: B027 - not all listen
        """Learn of a trial that a resumed search had begun; called for all of them, in their order."""

    def tell(self, values: Mapping[str, Any], scores: Sequence[float]) -> None:  # noqa: B027
        """Learn a trial's result: one number per objective; higher is better."""


class RandomSampler(Sampler):
    """Draws each field independently."""

    def values(self, index: int) -> dict[str, Any]:
        """Draw by the seed and the index alone."""
        return self.space.draw(Random(f"{self.seed}/{index}"))


class GridSampler(Sampler):
    """Every combination, the last field changing fastest."""

    def __init__(self, space: Space, seed: int) -> None:
        """Refuse a space with ranges, which have no finite list of values."""
        super().__init__(space, seed)
        self.size = sum(1 for _ in space.grid())

    def values(self, index: int) -> dict[str, Any] | None:
        """The combination with this number."""
        return next(itertools.islice(self.space.grid(), index, None), None)


class TPESampler(Sampler):
    """Optuna's tree-structured Parzen estimator, for one objective or several.

    Args:
        space: the space to draw from.
        seed: fixes all draws.
        objectives: count of numbers per result.

    Source:
        Watanabe, Tree-Structured Parzen Estimator (2023); several objectives as in Ozaki et al. (2022).
    """

    def __init__(self, space: Space, seed: int, objectives: int = 1) -> None:
        """Start a study in memory."""
        super().__init__(space, seed)
        self._optuna = require("optuna", extra="tune")
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        self._study = self._optuna.create_study(directions=["maximize"] * objectives)
        self._places = {name: self._place(dimension) for name, dimension in space.searched.items()}
        self._asked: list[tuple[dict[str, Any], Any]] = []

    def values(self, index: int) -> dict[str, Any]:
        """Values where a good score is likeliest; the first ten trials are random."""
        # A sampler of its own for each trial: a resumed search goes on as if it had not stopped.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            self._study.sampler = self._optuna.samplers.TPESampler(
                seed=Random(f"{self.seed}/{index}").getrandbits(32), constant_liar=True
            )
        asked = self._study.ask(self._places)
        values = {name: self._read(name, asked.params[name]) for name in self._places}
        self._asked.append((values, asked))
        return values

    def take_up(self, values: Mapping[str, Any]) -> None:
        """Add the trial to the study as running, so that later draws keep away from it."""
        self._study.enqueue_trial(self._params(values))
        self._asked.append((dict(values), self._study.ask(self._places)))

    def tell(self, values: Mapping[str, Any], scores: Sequence[float]) -> None:
        """Add the result to the study; a trial without a finite score counts as failed."""
        state = self._optuna.trial.TrialState
        finite = all(map(math.isfinite, scores))
        for i, (known, asked) in enumerate(self._asked):
            if known == dict(values):
                del self._asked[i]
                if finite:
                    self._study.tell(asked, list(scores))
                else:
                    self._study.tell(asked, state=state.FAIL)
                return
        if finite:  # of the run that is resumed
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=self._params(values),
                    distributions=self._places,
                    values=list(scores),
                    state=state.COMPLETE,
                )
            )

    def importance(self) -> dict[str, float]:
        """Share of the scores' variance that each field explains (fANOVA), largest first.

        Empty if the trials are too few or have equal scores.

        Source: Hutter, Hoos and Leyton-Brown, An Efficient Approach for Assessing Hyperparameter Importance
        (2014).
        """
        complete = self._optuna.trial.TrialState.COMPLETE
        scores = [trial.value for trial in self._study.get_trials(states=[complete])]
        if len(scores) < 4 or len(set(scores)) == 1:
            return {}
        evaluator = self._optuna.importance.FanovaImportanceEvaluator(seed=0)
        return self._optuna.importance.get_param_importances(self._study, evaluator=evaluator)

    def _place(self, dimension: Dimension) -> Any:
        places = self._optuna.distributions
        if dimension.kind == "choice":  # by number: a list is no value of Optuna's
            return places.CategoricalDistribution(list(range(len(dimension.given))))
        low, high = dimension.given
        if dimension.kind == "integer":
            return places.IntDistribution(low, high)
        return places.FloatDistribution(low, high, log=dimension.kind == "loguniform")

    def _read(self, name: str, drawn: Any) -> Any:
        dimension = self.space.searched[name]
        return dimension.given[drawn] if dimension.kind == "choice" else drawn

    def _params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values in the study's form."""
        return {
            name: d.given.index(values[name]) if d.kind == "choice" else values[name]
            for name, d in self.space.searched.items()
        }


def make_sampler(algorithm: str, space: Space, seed: int, objectives: int = 1) -> Sampler:
    """Make the sampler with this name.

    Raises:
        ConfigError: no sampler has it, or the sampler cannot search this space or several objectives.
        MissingExtra: Optuna is not installed.
    """
    if algorithm == "tpe":
        return TPESampler(space, seed, objectives)
    if algorithm not in ALGORITHMS:
        hint = nearest(algorithm, ALGORITHMS)
        raise ConfigError(f"there is no algorithm {algorithm!r}{hint}; expected one of {ALGORITHMS}")
    return GridSampler(space, seed) if algorithm == "grid" else RandomSampler(space, seed)
