"""Find the rank that is enough: double it as long as that helps."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica.checkpoint.atomic import Writer, replace_files
from lorica.config import LoraConfig
from lorica.errors import ConfigError, LoricaError, listing
from lorica.study.figures import save_figure, sheet
from lorica.train import presets
from lorica.train.console import make_console
from lorica.train.recipe import Recipe
from lorica.train.system import alone_in, write_atomically
from lorica.tune.journal import JOURNAL, TRIALS, Record
from lorica.tune.population import Population
from lorica.tune.schedulers import Goal
from lorica.tune.settings import RAMP, SEARCH, RampConfig, changes, in_order

FIGURE = "ramp"


@dataclass(frozen=True)
class Step:
    """One rank of a ramp.

    Args:
        r: the rank.
        score: best score on the validation rows; NaN if training failed.
        parameters: number of trained parameters.
        error: the reason for a failure.
    """

    r: int
    score: float
    parameters: int
    error: str | None = None


@dataclass(frozen=True)
class Ramp:
    """The curve of scores over ranks, and the rank to take.

    Args:
        goal: the metric.
        gain: improvement that justifies a doubling.
        steps: one step per rank, in order.
        r: the rank to take; None if no rank could be trained.
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
            score = f"{step.score:.4f}" if step.error is None else "failed"
            rows.append(f"{step.r:>4}  {step.parameters:>12,}  {score:>10}  {shown:>8}")
            before = before if math.isnan(step.score) else step.score
        rows += [f"r={s.r} failed: {s.error}; run again to try it again" for s in self.steps if s.error]
        if self.r is None:
            return "\n".join([*rows, "no rank could be trained"])
        ranks = [step.r for step in _scored(self.steps)]
        if self.r < ranks[-1]:
            why = f"r={ranks[ranks.index(self.r) + 1]} adds less than {self.gain:g}"
        else:
            why = "the largest that could be trained" if self.steps[-1].error else "the largest tried"
            why += f"; the gain was still above {self.gain:g}" if len(ranks) > 1 else ""
        return "\n".join([*rows, f"take r={self.r}: {why}"])


def ramp(
    recipe: Recipe,
    directory: str | Path,
    config: RampConfig | None = None,
    *,
    console: Console | None = None,
) -> Ramp:
    """Train a recipe at rising ranks over one base until another doubling no longer pays.

    ``lora_alpha`` keeps its ratio to r, so only the rank changes. Ranks that the folder holds are not trained
    again, unless they failed.

    Args:
        recipe: the recipe; its `method` is LoRA.
        directory: folder for the trials, ``results.jsonl`` and the figure.
        config: settings of the ramp.
        console: where to show progress. None makes a console.

    Raises:
        ConfigError: the recipe trains another method, or the folder holds a ramp of another recipe.
        LoricaError: the folder holds something else.
    """
    config, console = config or RampConfig(), console or make_console()
    with alone_in(directory, "ramp") as folder:
        return _ramp(recipe, folder, config, console)


def _ramp(recipe: Recipe, directory: Path, config: RampConfig, console: Console) -> Ramp:
    if recipe.baseline is not None or not isinstance(recipe.method, LoraConfig):
        raise ConfigError("a ramp is over LoRA's rank, and the recipe trains a baseline")
    recipe = in_order(presets.apply(recipe), directory / RAMP)
    goal = Goal.of(recipe)
    method = recipe.method
    records: dict[int, Record] = {}

    def rising() -> Iterator[tuple[str, Recipe]]:
        r = config.start
        while r <= config.limit:
            if r not in records:
                if r not in failed and _levelled(_steps(records, goal), goal, config.gain):
                    return
                alpha = method.lora_alpha * r / method.r
                alpha = int(alpha) if alpha.is_integer() else alpha
                yield f"r{r:03d}", recipe.replace(method={"r": r, "lora_alpha": alpha})
            r *= 2

    def keep(record: Record) -> None:
        records[record.values["method.r"]] = record

    _keep_settings(directory, recipe, config)
    population = Population(
        rising(),
        directory,
        slots=1,
        values=lambda name, recipe: {"method.r": recipe.method.r},
        on_end=keep,
        console=console,
    )
    failed = set()
    for record in population.journal.records.values():
        if record.status == "finished":
            keep(record)
        elif record.status == "failed":
            failed.add(record.values["method.r"])
            record.status = "waiting"
    population.run(resume=True)
    steps = _steps(records, goal)
    scored = _scored(steps)
    chosen = next((a.r for a, b in itertools.pairwise(scored) if not _pays(goal, config.gain, a, b)), None)
    if chosen is None and scored:
        chosen = scored[-1].r
    found = Ramp(goal, config.gain, tuple(steps), chosen)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no figure: matplotlib is not installed; it comes with: pip install 'lorica[study]'")
    else:
        _draw(found, directory)
    return found


def _keep_settings(directory: Path, recipe: Recipe, config: RampConfig) -> None:
    """Write the ramp's settings into its folder; refuse a folder with other trials."""
    there = directory / RAMP
    content = {"recipe": recipe.to_dict(), "ramp": dataclasses.asdict(config)}
    text = json.dumps(content, indent=2, default=str) + "\n"
    if there.is_file():
        if changed := changes(there, text, free=("ramp.limit", "ramp.gain")):
            raise ConfigError(
                f"the ramp in {directory} was started otherwise: {listing(changed)}. Choose another folder"
            )
    elif any((directory / name).exists() for name in (SEARCH, JOURNAL, TRIALS)):
        raise LoricaError(f"{directory} holds trials, but no {RAMP}; choose another folder")
    write_atomically(there, text)


def _steps(records: dict[int, Record], goal: Goal) -> list[Step]:
    return [
        Step(
            r,
            math.nan if record.status == "failed" else record.best(goal.metric, goal.mode),
            int(record.evaluations[-1].metrics["parameters"]) if record.evaluations else 0,
            record.error,
        )
        for r, record in sorted(records.items())
    ]


def _scored(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if not math.isnan(step.score)]


def _gained(goal: Goal, before: float, now: float) -> float:
    return now - before if goal.mode == "max" else before - now


def _pays(goal: Goal, gain: float, before: Step, now: Step) -> bool:
    return _gained(goal, before.score, now.score) > gain


def _levelled(steps: list[Step], goal: Goal, gain: float) -> bool:
    """Whether to stop: the last doubling did not pay, or two ranks in a row failed."""
    if len(steps) > 1 and not _scored(steps[-2:]):
        return True
    return any(not _pays(goal, gain, before, now) for before, now in itertools.pairwise(_scored(steps)))


def _draw(found: Ramp, directory: Path) -> None:
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
