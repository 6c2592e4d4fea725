"""Which rank is enough: double it for as long as that helps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica.checkpoint.atomic import Writer, replace_files
from lorica.config import LoraConfig
from lorica.errors import ConfigError, require
from lorica.study.figures import save_figure, sheet
from lorica.train import presets
from lorica.train.recipe import Recipe
from lorica.tune.journal import Record
from lorica.tune.population import Population
from lorica.tune.referee import Goal

FIGURE = "ramp"


@dataclass(frozen=True, kw_only=True)
class RampConfig:
    """How to look for a rank.

    Args:
        start: rank to begin with.
        limit: rank not to pass.
        gain: what a doubling must add to the metric on the validation rows (or take off the loss) to be worth
            it.
    """

    start: int = 1
    limit: int = 64
    gain: float = 0.005

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one cannot be.
        """
        if not 1 <= self.start <= self.limit:
            raise ConfigError(
                f"the ramp must start from 1 and end at {self.limit}, not start at {self.start}"
            )
        if not self.gain >= 0:
            raise ConfigError(f"gain must be 0 or more, not {self.gain}")


@dataclass(frozen=True)
class Step:
    """One rank of a ramp.

    Args:
        r: the rank.
        score: best score on the validation rows; NaN if training failed.
        parameters: how many were trained.
    """

    r: int
    score: float
    parameters: int


@dataclass(frozen=True)
class Ramp:
    """The curve, and what it says.

    Args:
        goal: metric.
        gain: that a doubling was asked for.
        steps: ranks that were tried, in order.
        r: the rank to take; None if none could be trained.
    """

    goal: Goal
    gain: float
    steps: tuple[Step, ...]
    r: int | None

    def __str__(self) -> str:
        """The curve as a table, and the advice."""
        rows = [f"{'r':>4}  {'parameters':>12}  {self.goal.metric:>10}  {'gain':>8}"]
        before = math.nan
        for step in self.steps:
            gained = _gained(self.goal, before, step.score)
            shown = "" if math.isnan(gained) else f"{gained:+.4f}"
            rows.append(f"{step.r:>4}  {step.parameters:>12,}  {step.score:>10.4f}  {shown:>8}")
            before = step.score
        if self.r is None:
            return "\n".join([*rows, "no rank could be trained"])
        last = self.steps[-1].r
        why = (
            f"the largest tried; the gain was still above {self.gain:g}"
            if last == self.r
            else f"r={self.r * 2} adds less than {self.gain:g}"
        )
        return "\n".join([*rows, f"take r={self.r}: {why}"])


def ramp(
    recipe: Recipe,
    directory: str | Path,
    config: RampConfig | None = None,
    *,
    console: Console | None = None,
) -> Ramp:
    """Train a recipe at rising ranks, over one base, until another doubling no longer pays.

    ``lora_alpha`` keeps its ratio to r, so that only the rank changes. Ranks that the folder holds already
    are not trained again.

    Args:
        recipe: what to train; its `method` is LoRA.
        directory: folder for the trials, ``results.jsonl`` and the figure.
        config: how to look.
        console: where to show progress. None makes one.

    Raises:
        ConfigError: the recipe trains another method.
    """
    config = config or RampConfig()
    if recipe.baseline is not None or not isinstance(recipe.method, LoraConfig):
        raise ConfigError("a ramp is over LoRA's rank, and the recipe trains a baseline")
    recipe = presets.apply(recipe)
    goal = Goal.of(recipe)
    method = recipe.method
    records: dict[int, Record] = {}

    def rising() -> Iterator[tuple[str, Recipe]]:
        r = config.start
        while r <= config.limit and not _levelled(_steps(records, goal), goal, config.gain):
            alpha = method.lora_alpha * r / method.r
            alpha = int(alpha) if alpha.is_integer() else alpha
            yield f"r{r:03d}", recipe.replace(method={"r": r, "lora_alpha": alpha})
            r *= 2

    def told(record: Record) -> None:
        records[record.values["method.r"]] = record

    population = Population(
        rising(),
        directory,
        slots=1,
        values=lambda name, recipe: {"method.r": recipe.method.r},
        told=told,
        console=console,
    )
    for record in population.journal.records.values():
        if record.status in ("finished", "failed"):
            told(record)
    population.run(resume=True)
    steps = _steps(records, goal)
    chosen = next((a.r for a, b in _pairs(steps) if not _pays(goal, config.gain, a, b)), None)
    if chosen is None:
        chosen = next((step.r for step in reversed(steps) if not math.isnan(step.score)), None)
    found = Ramp(goal, config.gain, tuple(steps), chosen)
    _draw(found, Path(directory))
    return found


def _steps(records: dict[int, Record], goal: Goal) -> list[Step]:
    return [
        Step(
            r,
            record.best(goal.metric, goal.mode),
            int(record.evaluations[-1].metrics["parameters"]) if record.evaluations else 0,
        )
        for r, record in sorted(records.items())
    ]


def _pairs(steps: list[Step]) -> Iterator[tuple[Step, Step]]:
    yield from itertools.pairwise(steps)


def _gained(goal: Goal, before: float, now: float) -> float:
    return now - before if goal.mode == "max" else before - now


def _pays(goal: Goal, gain: float, before: Step, now: Step) -> bool:
    return _gained(goal, before.score, now.score) > gain


def _levelled(steps: list[Step], goal: Goal, gain: float) -> bool:
    return any(not _pays(goal, gain, before, now) for before, now in _pairs(steps))


def _draw(found: Ramp, directory: Path) -> None:
    require("matplotlib", extra="study")

    def draw() -> Any:
        figure, (axes,) = sheet(1, "Rank against quality")
        axes.plot([step.r for step in found.steps], [step.score for step in found.steps], "o-")
        if found.r is not None:
            axes.axvline(found.r, color="0.6", linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks([step.r for step in found.steps], [str(step.r) for step in found.steps])
        axes.set(xlabel="r", ylabel=found.goal.metric)
        return figure

    writers: dict[str, Writer] = {
        f"{FIGURE}.{suffix}": partial(save_figure, draw) for suffix in ("png", "svg")
    }
    replace_files(directory, writers)
