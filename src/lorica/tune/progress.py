"""The progress of a search: a live table on a terminal, one line per event elsewhere."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lorica.train.console import duration
from lorica.train.system import write_atomically
from lorica.tune.journal import Record
from lorica.tune.schedulers import Goal

TABLE = "trials.csv"


class ProgressTable:
    """Shows trials. As a context manager it holds its place on a terminal until the end.

    Args:
        console: where to show them.
        rows: number of trials in the table on a terminal; the latest are shown.
    """

    def __init__(self, console: Console, rows: int = 30) -> None:
        """Show nothing yet."""
        self.console = console
        self.rows = rows
        self._records: dict[str, Record] = {}
        self._said: dict[str, tuple[Any, ...]] = {}
        self._live: Live | None = None

    def __enter__(self) -> ProgressTable:
        """Take a place on the terminal."""
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the last table on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, line: str) -> None:
        """Print a line above the table."""
        self.console.print(line, markup=False, soft_wrap=True)

    def show(self, record: Record) -> None:
        """Show a trial's new state."""
        self._records[record.name] = record
        if self._live is not None:
            self._live.update(table(list(self._records.values())[-self.rows :]), refresh=True)
            return
        state = (record.status, len(record.evaluations))
        if self._said.get(record.name) != state:
            self._said[record.name] = state
            self.note(line(record))


def line(record: Record) -> str:
    """One line on a trial."""
    parts = [f"trial {record.name}", record.status]
    if record.evaluations:
        last = record.evaluations[-1]
        scores = "  ".join(f"{name} {value:.4f}" for name, value in _shown(last.metrics))
        parts.append(f"evaluation {last.time} (epoch {last.epoch:.2f})  {scores}")
    elif record.values:
        parts.append(shown_values(record))
    if record.error:
        parts.append(record.error.splitlines()[0])
    return "  ".join(parts)


def table(records: list[Record]) -> Table:
    """Trials in a table: status, values, scores, evaluations, time."""
    result = Table()
    for column in ("trial", "status", "values", "scores", "evaluations", "time"):
        result.add_column(column, overflow="fold")
    for record in records:
        last = record.evaluations[-1] if record.evaluations else None
        scores = "  ".join(f"{name} {value:.4f}" for name, value in _shown(last.metrics)) if last else ""
        cells = [record.name, record.status, shown_values(record), record.error or scores]
        cells += [str(last.time), duration(last.seconds)] if last else ["", ""]
        result.add_row(*map(Text, cells))
    return result


def shown_values(record: Record) -> str:
    """The values that distinguish a trial, in short."""
    return "  ".join(f"{name.rpartition('.')[2]}={_value(value)}" for name, value in record.values.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _shown(metrics: dict[str, float]) -> list[tuple[str, float]]:
    names = ("loss", "accuracy", "f1", "perplexity", "pearson", "matthews")
    return [(name, metrics[name]) for name in names if name in metrics][:3] or list(metrics.items())[:3]


def ranked(records: Sequence[Record], goal: Goal) -> list[Record]:
    """Records by score, the best first; those without a score last."""
    sign = -1 if goal.mode == "max" else 1

    def key(record: Record) -> tuple[bool, float]:
        score = record.best(goal.metric, goal.mode)
        return math.isnan(score), 0.0 if math.isnan(score) else sign * score

    return sorted(records, key=key)


def trials_table(records: Sequence[Record], goal: Goal, limit: int = 20) -> Table:
    """The best trials, and the number of the others."""
    table = Table(
        title=f"{len(records)} trials by {goal.metric}" + (f", the first {limit}" * (len(records) > limit))
    )
    for column in ("trial", "status", goal.metric, "parameters", "evaluations", "values"):
        table.add_column(column, overflow="fold")
    for record in ranked(records, goal)[:limit]:
        last = record.evaluations[-1].metrics if record.evaluations else {}
        score = record.best(goal.metric, goal.mode)
        table.add_row(
            Text(record.name),
            record.status,
            "" if math.isnan(score) else f"{score:.4f}",
            f"{last['parameters']:,.0f}" if "parameters" in last else "",
            str(len(record.evaluations)),
            Text(record.error or shown_values(record)),
        )
    return table


def write_table(records: Sequence[Record], directory: Path, goal: Goal) -> Path:
    """Write ``trials.csv``: a row per trial, with its searched fields and its metrics at its best."""
    fields = list(dict.fromkeys(name for record in records for name in record.values))
    metrics = list(
        dict.fromkeys(name for record in records for each in record.evaluations for name in each.metrics)
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, ["trial", "status", *fields, "evaluations", "seconds", *metrics, "error"]))
    for record in ranked(records, goal):
        best = record.at_best(goal.metric, goal.mode)
        scores = {} if best is None else best.metrics
        seconds = record.evaluations[-1].seconds if record.evaluations else ""
        cells = [
            record.name,
            record.status,
            *(record.values.get(name, "") for name in fields),
            len(record.evaluations),
            seconds,
            *(scores.get(name, "") for name in metrics),
            record.error or "",
        ]
        writer.writerow(map(_cell, cells))
    path = directory / TABLE
    write_atomically(path, text.getvalue())
    return path


def _cell(value: Any) -> Any:
    """A value as a cell: a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if isinstance(value, (int, float)):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
