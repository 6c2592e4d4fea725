"""What runs in a process of Ray Tune's: a few trials, trained together and reported as they go.

this process                                   the process that searches
a trial is evaluated ── tune.report ─────────▶ the referee decides, and writes it into results.jsonl
it goes on, or leaves ◀── results.jsonl ────── then Ray lets the report return
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lorica.train.recipe import Recipe
from lorica.tune.base import SharedBase
from lorica.tune.crew import Crew
from lorica.tune.journal import ENDED, Journal, Record, Status
from lorica.tune.population import JOURNAL, TRIALS
from lorica.tune.referee import Goal

_BASES: dict[str, SharedBase] = {}
"""Bases that this process has opened: Ray gives it one trial of its own after another."""


def train_trials(config: Mapping[str, Any], *, base: Any, directory: str) -> None:
    """Train, from the newest checkpoints where the trials were begun before.

    An error of a trial's own is reported, not raised: to Ray it would look as if the process had died, and
    be worth another try.

    Args:
        config: ``trials``, each with its name and its recipe as YAML.
        base: of the search's recipe, from Ray's object store; None where each trial loads its own.
        directory: the search's folder, reached by every machine.
    """
    folder = Path(directory)
    # The search made them, of a recipe that its user trusts.
    trials = [
        (name, Recipe.from_dict(yaml.safe_load(text), trust_task=True)) for name, text in config["trials"]
    ]
    crew = Crew(
        _Remote(folder / JOURNAL),
        lambda name: folder / TRIALS / name,
        slots=len(trials),
        base=None if base is None else _base(base),
        resume=True,
    )
    crew.run(iter(trials))


class _Remote:
    """The referee of the process that searches, as it is reached from here; methods as of `Referee`."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal

    def begins(self, name: str, recipe: Recipe, values: Mapping[str, object]) -> Record:
        """What is known of a trial: it may have ended before this process took over from one that died."""
        return Journal(self._journal, mend=False).record(name)

    def runs(self, name: str) -> None:
        """Nothing: its first evaluation says so."""

    def goal_of(self, recipe: Recipe) -> Goal:
        """The recipe's own; what counts is decided elsewhere."""
        return Goal.of(recipe)

    def evaluated(
        self, name: str, goal: Goal, metrics: Mapping[str, float], step: int, epoch: float, seconds: float
    ) -> bool:
        """Report it, and read what was decided."""
        _say(name, "evaluation", metrics=dict(metrics), step=step, epoch=epoch, seconds=seconds)
        return Journal(self._journal, mend=False).record(name).status in ENDED

    def ends(self, name: str, status: Status, **more: object) -> Record:
        """Report it."""
        _say(name, status, **more)
        return Journal(self._journal, mend=False).record(name)


def _say(name: str, kind: str, **more: object) -> None:
    from ray import tune

    # As one string: Ray flattens what is nested, and joins names by slashes.
    tune.report({"said": json.dumps({"trial": name, "kind": kind, **more})})


def _base(shipped: tuple[Any, ...]) -> SharedBase:
    key = shipped[0]
    if key not in _BASES:
        _BASES.clear()
        _BASES[key] = SharedBase.unpacked(shipped)
    return _BASES[key]
