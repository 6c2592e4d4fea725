"""The journal of a search: a file of JSON lines, one per evaluation and one per end of a trial."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorica.errors import FileError, nearest
from lorica.plain import plain
from lorica.reading import parse_json

JOURNAL = "results.jsonl"
"""Name of the file, in a search's folder."""

TRIALS = "trials"
"""Name of the folder beside it that holds a folder for each trial."""

Status = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED: tuple[Status, ...] = ("finished", "stopped", "failed")

_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Evaluation:
    """A trial's scores at one of its evaluations.

    Args:
        time: number of the evaluation, from 1.
        step: optimizer steps taken.
        epoch: passes over the training rows.
        metrics: scores on the validation rows, the loss included.
        seconds: since the trial began, in the run that made the evaluation.
        stops: whether the scheduler ended the trial here.
    """

    time: int
    step: int
    epoch: float
    metrics: dict[str, float]
    seconds: float
    stops: bool = False


@dataclass
class Record:
    """A trial's record.

    Args:
        name: the trial's name.
        values: the searched fields by their names in a recipe.
        status: the trial's state.
        evaluations: its evaluations in order.
        error: the reason for a failure.
        metrics: split → scores at the end.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    status: Status = "waiting"
    evaluations: list[Evaluation] = field(default_factory=list)
    error: str | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def at_best(self, metric: str, mode: str) -> Evaluation | None:
        """The best evaluation, the first of equals; None if none has a finite score."""
        sign = 1 if mode == "max" else -1
        scored = [each for each in self.evaluations if not math.isnan(score_of(each.metrics, metric))]
        return max(scored, key=lambda each: sign * score_of(each.metrics, metric), default=None)

    def best(self, metric: str, mode: str) -> float:
        """The best score of all evaluations; NaN if there is none."""
        best = self.at_best(metric, mode)
        return math.nan if best is None else score_of(best.metrics, metric)


class NoMetric(FileError):
    """An evaluation lacks the metric that decides."""


def score_of(metrics: Mapping[str, float], metric: str) -> float:
    """The named metric; NaN if it is not finite.

    Raises:
        NoMetric: no metric has this name; the message lists the names there are.
    """
    name = metric.removeprefix("eval_")
    if name not in metrics:
        raise NoMetric(
            f"the evaluation has no metric {name!r}{nearest(name, metrics)}; it has: {', '.join(metrics)}"
        )
    return float(metrics[name]) if math.isfinite(metrics[name]) else math.nan


class Journal:
    """The journal's file and its records.

    A line is on disk before its decision takes effect, so a search killed at any moment continues from its
    last decision. A line that was cut short is dropped.

    Args:
        path: the file; created with the first line.
        mend: remove a line that was cut short from the file. False is for a file that another process writes.
    """

    def __init__(self, path: Path, *, mend: bool = True) -> None:
        """Read the file, if there is one."""
        self.path = path
        self._mend = mend
        self.records: dict[str, Record] = {}
        if path.is_file():
            self._read()

    def record(self, name: str) -> Record:
        """The record of a trial."""
        return self.records.setdefault(name, Record(name))

    def begin(self, name: str, values: Mapping[str, Any]) -> Record:
        """Note a new trial and its values."""
        if name not in self.records or self.records[name].values != dict(values):
            self._write({"trial": name, "values": dict(values)})
        self.record(name).values = dict(values)
        return self.record(name)

    def evaluated(self, name: str, evaluation: Evaluation) -> None:
        """Note an evaluation of a trial."""
        self._write({"trial": name, **vars(evaluation)})
        self.record(name).evaluations.append(evaluation)

    def ended(self, name: str, status: Status, **more: Any) -> None:
        """Note that a trial finished, was stopped, or failed."""
        self._write({"trial": name, "status": status, **more})
        self._end(name, status, more)

    def _end(self, name: str, status: Status, more: Mapping[str, Any]) -> None:
        record = self.record(name)
        record.status, record.error = status, more.get("error")
        record.metrics = {split: _scores(found) for split, found in (more.get("metrics") or {}).items()}

    def _write(self, row: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(row), default=str, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {error.strerror or error}") from error
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            where = f"line {number} of {self.path}"
            try:
                self._take(parse_json(line, where))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                raise FileError(f"{where} is no line of a search: {reason}") from error
        if whole != content and self._mend:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def _take(self, row: Any) -> None:
        if not isinstance(row, dict):
            raise TypeError(f"it holds {row!r}")
        name = row.pop("trial")
        # It names a folder, which is read, copied and removed.
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be a trial's name")
        if "time" in row:
            row["metrics"] = _scores(row["metrics"])
            evaluation = Evaluation(**row)
            for part in ("time", "step", "epoch", "seconds"):
                if not _is_number(getattr(evaluation, part)):
                    raise ValueError(f"{part} is {getattr(evaluation, part)!r}")
            self.record(name).evaluations.append(evaluation)
        elif "status" in row:
            status = row.pop("status")
            if status not in ENDED or not isinstance(row.get("error"), str | None):
                raise ValueError(f"it ends as {status!r} with {row.get('error')!r}")
            self._end(name, status, row)
        elif isinstance(row["values"], dict):
            self.record(name).values = row["values"]
        else:
            raise TypeError(f"values are {row['values']!r}")


def _scores(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Scores from JSON, where null stands for a number that is not finite."""
    if not isinstance(metrics, Mapping) or not all(v is None or _is_number(v) for v in metrics.values()):
        raise TypeError(f"metrics are {metrics!r}")
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
