"""A search in four figures: scores over time, parallel coordinates, rank against quality, importance."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorica.checkpoint.atomic import Writer, replace_files
from lorica.errors import require
from lorica.study.figures import save_figure, sheet
from lorica.tune.journal import Record, score_of
from lorica.tune.samplers import TPESampler
from lorica.tune.schedulers import Goal
from lorica.tune.space import Space

FIGURES = "figures"
_RANK = "method.r"


def write_figures(records: Sequence[Record], space: Space, goal: Goal, directory: Path) -> list[str]:
    """Write a search's figures as PNG and SVG into ``figures/``.

    Args:
        records: one record per trial.
        space: the searched space.
        goal: the metric that decided.
        directory: the search's folder.

    Returns:
        Names of the figures; a figure with nothing to draw is left out.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require("matplotlib", extra="study")
    scored = [record for record in records if not math.isnan(record.best(goal.metric, goal.mode))]
    drawings: dict[str, Callable[[], Any]] = {}
    if scored:
        drawings["scores"] = lambda: _over_time(scored, goal)
        drawings["coordinates"] = lambda: _parallel(scored, space, goal)
    if _RANK in space.searched and len({record.values[_RANK] for record in scored}) > 1:
        drawings["ranks"] = lambda: _ranks(scored, goal)
    shares = importance(scored, space, goal)
    if shares:
        drawings["importance"] = lambda: _importance(shares, goal)
    writers: dict[str, Writer] = {
        f"{name}.{suffix}": partial(save_figure, draw)
        for name, draw in drawings.items()
        for suffix in ("png", "svg")
    }
    if writers:
        replace_files(directory / FIGURES, writers)
    return list(drawings)


def importance(records: Sequence[Record], space: Space, goal: Goal) -> dict[str, float]:
    """The share of the scores' variance that each searched field explains; empty without Optuna."""
    if importlib.util.find_spec("optuna") is None or len(space.searched) < 2:
        return {}
    study = TPESampler(space, seed=0)
    for record in records:
        study.tell(record.values, [record.best(goal.metric, goal.mode)])
    return study.importance()


def _over_time(records: Sequence[Record], goal: Goal) -> Any:
    figure, (axes,) = sheet(1, f"{goal.metric} on the validation rows, trial by trial")
    best = _best(records, goal)
    for record in records:
        times = [each.epoch for each in record.evaluations]
        scores = [score_of(each.metrics, goal.metric) for each in record.evaluations]
        mark = {"finished": "o", "stopped": "x"}.get(record.status, ".")
        colour = "tab:blue" if record is best else "0.6"
        axes.plot(times, scores, color=colour, linewidth=1, zorder=2 if record is best else 1)
        axes.plot(times[-1:], scores[-1:], mark, color=colour, markersize=4)
    axes.set(xlabel="epoch (o finished, x stopped)", ylabel=goal.metric)
    return figure


def _parallel(records: Sequence[Record], space: Space, goal: Goal) -> Any:
    figure, (axes,) = sheet(1, "Each trial's values, coloured by its score")
    figure.set_size_inches(max(1.8 * (len(space.searched) + 1), 5), 4)
    columns = [*space.searched, goal.metric]
    heights: dict[str, list[float]] = {}
    for place, name in enumerate(columns):
        heights[name], labels = _heights(records, space, goal, name)
        for height, label in labels:
            axes.annotate(label, (place, height), fontsize=7, xytext=(3, 0), textcoords="offset points")
        axes.axvline(place, color="0.8", linewidth=0.8, zorder=0)
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    for i in sorted(range(len(records)), key=lambda i: heights[goal.metric][i]):
        line = [heights[name][i] for name in columns]
        axes.plot(range(len(columns)), line, color=colours(heights[goal.metric][i]), linewidth=1.2, alpha=0.8)
    axes.set_xticks(range(len(columns)), [name.rpartition(".")[2] for name in columns], fontsize=8)
    axes.set_yticks([])
    return figure


def _heights(
    records: Sequence[Record], space: Space, goal: Goal, name: str
) -> tuple[list[float], list[tuple[float, str]]]:
    """Each trial's height on an axis from 0 to 1, better scores higher, and the axis's tick labels."""
    if name == goal.metric:
        values = [record.best(goal.metric, goal.mode) for record in records]
        low, high = min(values), max(values)
        raised = [_share(value, low, high) for value in values]
        raised = raised if goal.mode == "max" else [1 - share for share in raised]
        ends = (low, high) if goal.mode == "max" else (high, low)
        return raised, [(0.0, f"{ends[0]:.4g}"), (1.0, f"{ends[1]:.4g}")]
    dimension = space.searched[name]
    given = [record.values[name] for record in records]
    if dimension.kind == "choice":
        last = max(len(dimension.given) - 1, 1)
        labels = [(i / last, _short(value)) for i, value in enumerate(dimension.given)]
        return [dimension.given.index(value) / last for value in given], labels
    scale = math.log if dimension.kind == "loguniform" else float
    low, high = (scale(end) for end in dimension.given)
    labels = [(0.0, f"{dimension.given[0]:.3g}"), (1.0, f"{dimension.given[1]:.3g}")]
    return [_share(scale(value), low, high) for value in given], labels


def _ranks(records: Sequence[Record], goal: Goal) -> Any:
    figure, (axes,) = sheet(1, "Rank against quality")
    for status, mark in (("finished", "o"), ("stopped", "x")):
        of = [record for record in records if record.status == status]
        scores = [record.best(goal.metric, goal.mode) for record in of]
        axes.plot([record.values[_RANK] for record in of], scores, mark, label=status)
    axes.set_xscale("log", base=2)
    ranks = sorted({record.values[_RANK] for record in records})
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set(xlabel="r", ylabel=f"best {goal.metric}")
    axes.legend(fontsize=8)
    return figure


def _importance(shares: dict[str, float], goal: Goal) -> Any:
    figure, (axes,) = sheet(1, f"Share of the variance of {goal.metric} explained (fANOVA)")
    names = list(reversed(shares))
    axes.barh([name.rpartition(".")[2] for name in names], [shares[name] for name in names])
    axes.set_xlim(0, 1)
    return figure


def _best(records: Sequence[Record], goal: Goal) -> Record:
    sign = 1 if goal.mode == "max" else -1
    return max(records, key=lambda record: sign * record.best(goal.metric, goal.mode))


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
