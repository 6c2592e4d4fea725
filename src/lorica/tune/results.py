"""A search's trials as a table: to look at, and as a file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from lorica.train.files import write_atomically
from lorica.tune.board import shown_values
from lorica.tune.journal import Record
from lorica.tune.referee import Goal

TABLE = "trials.csv"


def ranked(records: Sequence[Record], goal: Goal) -> list[Record]:
    """Best score first; those without one last."""
    sign = -1 if goal.mode == "max" else 1

    def key(record: Record) -> tuple[bool, float]:
        score = record.best(goal.metric, goal.mode)
        return math.isnan(score), 0.0 if math.isnan(score) else sign * score

    return sorted(records, key=key)


def trials_table(records: Sequence[Record], goal: Goal, limit: int = 20) -> Table:
    """The best trials, and how many there are beside them."""
    table = Table(
        title=f"{len(records)} trials by {goal.metric}" + (f", the first {limit}" * (len(records) > limit))
    )
    for column in ("trial", "status", goal.metric, "parameters", "evaluations", "values"):
        table.add_column(column, overflow="fold")
    for record in ranked(records, goal)[:limit]:
        last = record.evaluations[-1].metrics if record.evaluations else {}
        score = record.best(goal.metric, goal.mode)
        table.add_row(
            record.name,
            record.status,
            "" if math.isnan(score) else f"{score:.4f}",
            f"{last['parameters']:,.0f}" if "parameters" in last else "",
            str(len(record.evaluations)),
            escape(record.error or shown_values(record)),
        )
    return table


def write_table(records: Sequence[Record], directory: Path, goal: Goal) -> Path:
    """Write ``trials.csv``: a row a trial; its searched fields, and its metrics at its best moment."""
    fields = list(dict.fromkeys(name for record in records for name in record.values))
    metrics = list(
        dict.fromkeys(name for record in records for each in record.evaluations for name in each.metrics)
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "status", *fields, "evaluations", "seconds", *metrics, "error"])
    for record in ranked(records, goal):
        best = record.at_best(goal.metric, goal.mode)
        scores = {} if best is None else best.metrics
        seconds = record.evaluations[-1].seconds if record.evaluations else ""
        writer.writerow(
            [
                record.name,
                record.status,
                *(record.values.get(name, "") for name in fields),
                len(record.evaluations),
                seconds,
                *(scores.get(name, "") for name in metrics),
                record.error or "",
            ]
        )
    path = directory / TABLE
    write_atomically(path, text.getvalue())
    return path
