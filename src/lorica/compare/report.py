"""The results as files: the table, its numbers, and the plot of quality against trainable parameters.

The plot is the paper's figure 2.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorica.checkpoint.atomic import Writer, replace_files
from lorica.compare.table import Score, Table
from lorica.plain import as_json
from lorica.train.record import versions

_WIDE = 3  # panels in a row
_MARKS = "osD^vP*Xhd<>p"


def drawn(table: Table) -> dict[str, Writer]:
    """File name → function that writes it; empty without matplotlib, or without anything to show."""
    if importlib.util.find_spec("matplotlib") is None or not any(s.centre is not None for s in table.scores):
        return {}
    return {f"quality.{suffix}": lambda path: _save(lambda: draw(table), path) for suffix in ("png", "svg")}


def draw(table: Table) -> Any:
    """A panel per task and size: a point per method with its deviation, and a line per series."""
    from matplotlib.figure import Figure

    names = table.columns
    columns = min(len(names), _WIDE)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(4.2 * columns, 6), 3.4 * rows + 1.1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    marks: dict[str, Any] = {}
    for axis, name in zip(axes, names, strict=False):
        _panel(axis, table, [score for score in table.scores if score.column == name], marks)
        axis.set_title(name, fontsize=9)
    figure.supxlabel("trainable parameters", fontsize=9)
    figure.legend(marks.values(), marks.keys(), loc="outside upper center", ncols=5, fontsize=7)
    return figure


def _panel(axis: Any, table: Table, scores: list[Score], marks: dict[str, Any]) -> None:
    trainable = {cost.method: cost.trainable for cost in table.costs}
    series: dict[str, list[tuple[int, float]]] = {}
    for i, cost in enumerate(table.costs):
        score = next(score for score in scores if score.method == cost.method)
        count = trainable[cost.method]
        if score.centre is None or count is None:
            continue
        color, mark = f"C{i % 10}", _MARKS[i % len(_MARKS)]
        if count == 0:  # nothing trains, and a logarithm has no zero
            marks[cost.method] = axis.axhline(score.centre, color=color, linestyle=":", linewidth=1)
            continue
        error = score.deviation or 0.0
        marks[cost.method] = axis.errorbar(
            [count], [score.centre], yerr=[error], fmt=mark, color=color, capsize=2, markersize=5
        )
        if cost.series is not None:
            series.setdefault(cost.series, []).append((count, score.centre))
    for points in series.values():
        axis.plot(*zip(*sorted(points), strict=True), color="0.7", linewidth=1, zorder=0)
    axis.set_xscale("log")
    axis.tick_params(labelsize=7)


def _save(draw: Callable[[], Any], path: Path) -> None:
    import matplotlib

    # No date, and names derived from the content, so that equal tables give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "lorica"}):
        draw().savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def write_table(table: Table, output: str | Path) -> list[Path]:
    """Write table.md, table.json and, if matplotlib is installed, the plot.

    Returns:
        The files.

    Raises:
        FileError: the folder cannot be written.
    """
    data = as_json({**asdict(table), "versions": versions()})
    writers: dict[str, Writer] = {
        **drawn(table),
        "table.md": lambda path: _text(path, table.markdown()),
        "table.json": lambda path: _text(path, data + "\n"),
    }
    replace_files(Path(output), writers)
    return [Path(output) / name for name in writers]


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
