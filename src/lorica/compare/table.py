"""A comparison's results: scores over the seeds, costs, and the table of both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorica.compare.check import lower_is_better
from lorica.compare.file import Comparison
from lorica.compare.results import Results, Row, score_of
from lorica.compare.runs import Cell, Run, choose
from lorica.config import family_of
from lorica.train.console import size

NONE = "–"
NO_SHARE = ("nist", "cider")
"""Metrics that may be below 1 but are not shares: their scale is unbounded."""


@dataclass(frozen=True)
class Score:
    """A method's score on a task.

    Args:
        task: name of the task.
        size: number of training rows drawn, or None for all.
        metric: name of the metric.
        method: name of the method.
        learning_rate: the best, or None.
        values: the metric for each seed with a result; None if it is not a number.
        centre: their mean or median; None if there are no values, or one is not a number.
        deviation: their standard deviation (of a sample); None for fewer than two values.
        missing: seeds without a result.
        decides: whether this metric decides, or is only shown.
        best: whether no other method has a better centre here.
    """

    task: str
    size: int | None
    metric: str
    method: str
    learning_rate: float | None
    values: list[float | None]
    centre: float | None
    deviation: float | None
    missing: int
    decides: bool = True
    best: bool = False

    @property
    def column(self) -> str:
        """Its column in the table."""
        rows = "" if self.size is None else f", n = {self.size:,}"
        return f"{self.task}{rows} ({self.metric})"

    @property
    def is_share(self) -> bool:
        """Whether it is shown in per cent: a metric whose largest value is 1, such as accuracy."""
        bounded = not lower_is_better(self.metric) and self.metric not in NO_SHARE
        return bounded and all(abs(value) <= 1 for value in self.values if value is not None)

    def __str__(self) -> str:
        """Centre and deviation; shares as per cent."""
        if not self.values:
            return NONE
        if self.centre is None:
            return "diverged"
        scale, digits = (100, 1) if self.is_share else (1, 3 if lower_is_better(self.metric) else 2)
        spread = "" if self.deviation is None else f" ± {scale * self.deviation:.{digits}f}"
        few = f" ({len(self.values)} of {len(self.values) + self.missing})" if self.missing else ""
        return f"{scale * self.centre:.{digits}f}{spread}{few}"


@dataclass(frozen=True)
class Cost:
    """A method's costs, over its runs with the best learning rates.

    Args:
        method: its name.
        family: selective, reparametrisation, additive, or prompting.
        series: its series in the plot.
        trainable: number of parameters that train, a new head included; the largest of any task.
        checkpoint_bytes: bytes to store beside the base; likewise.
        step_seconds: median over runs of the median seconds per step.
        peak_memory: largest memory of a run's process, in bytes; None if runs shared a process.
    """

    method: str
    family: str
    series: str | None
    trainable: int | None
    checkpoint_bytes: int | None
    step_seconds: float | None
    peak_memory: int | None


@dataclass(frozen=True)
class Table:
    """A comparison's results.

    Args:
        scores: one per method, task and size.
        costs: one per method.
        summary: ``"mean"`` or ``"median"``.
        split: the rows that were scored.
        failures: the error of each failed run, one line per run.
    """

    scores: list[Score]
    costs: list[Cost]
    summary: str
    split: str
    failures: list[str]

    @property
    def columns(self) -> list[str]:
        """Tasks, sizes and metrics."""
        return list(dict.fromkeys(score.column for score in self.scores))

    @property
    def deciding(self) -> list[Score]:
        """The scores by the metrics that decide."""
        return [score for score in self.scores if score.decides]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings, and a row of cells per method; the best of a column is between asterisks."""
        head = ["method", "class", "trainable", *self.columns]
        averaged = len({s.column for s in self.deciding}) > 1 and all(s.is_share for s in self.deciding)
        head += ["average"] * averaged
        head += ["checkpoint", "s/step", "peak memory"]
        lines = []
        averages = {cost.method: self._average(cost.method) for cost in self.costs} if averaged else {}
        known = [value for value in averages.values() if value is not None]
        for cost in self.costs:
            found = {s.column: s for s in self.scores if s.method == cost.method}
            cells = [f"**{s}**" if s.best else str(s) for s in (found[name] for name in self.columns)]
            if averaged:
                value = averages[cost.method]
                text = NONE if value is None else f"{value:.1f}"
                best = value is not None and value == max(known) and len(known) > 1
                cells.append(f"**{text}**" if best else text)
            lines.append(
                [
                    cost.method,
                    cost.family,
                    NONE if cost.trainable is None else f"{cost.trainable:,}",
                    *cells,
                    NONE if cost.checkpoint_bytes is None else size(cost.checkpoint_bytes),
                    NONE if cost.step_seconds is None else f"{cost.step_seconds:.3f}",
                    NONE if cost.peak_memory is None else size(cost.peak_memory),
                ]
            )
        return head, lines

    def _average(self, method: str) -> float | None:
        """Mean of the metrics that decide, in per cent; None if one is missing."""
        scores = [score for score in self.deciding if score.method == method]
        if any(score.centre is None for score in scores):
            return None
        return 100 * statistics.mean(s.centre for s in scores if s.centre is not None)

    def rates(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of the learning rates that were chosen."""
        found = {(s.method, s.column): s.learning_rate for s in self.deciding}
        columns = list(dict.fromkeys(column for _, column in found))
        head = ["learning rate", *columns]
        lines = []
        for cost in self.costs:
            rates = [found[cost.method, name] for name in columns]
            lines.append([cost.method, *(NONE if rate is None else f"{rate:g}" for rate in rates)])
        return head, lines

    @property
    def caption(self) -> str:
        """A line that says what the figures are."""
        seeds = max((len(s.values) + s.missing for s in self.scores), default=0)
        return (
            f"{self.summary.capitalize()} ± standard deviation of {seeds} seed{'s' * (seeds != 1)} on the "
            f"{self.split} rows, each method at its best learning rate on the validation rows; shares in per "
            "cent. Trainable parameters and checkpoint include a new head. Seconds a step: median. Peak "
            "memory: of the run's own process, libraries included."
        )

    def markdown(self) -> str:
        """The table and the learning rates."""
        parts = [self.caption, "", _markdown(*self.rows()), "", _markdown(*self.rates())]
        if self.failures:
            parts += ["", "Without a result:", "", *(f"- {line}" for line in self.failures)]
        return "\n".join(parts) + "\n"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def summarise(spec: Comparison, plan: Sequence[Cell], results: Results, failures: dict[str, str]) -> Table:
    """Put the finished runs of a comparison into its table.

    Raises:
        ConfigError: a task's runs do not have its metric.
    """
    scores: list[Score] = []
    rows: dict[str, list[Row]] = {method: [] for method in spec.methods}
    for cell in plan:
        best = choose(cell, results)
        runs = cell.at(best) if best is not None else []
        found = [row for run in runs if (row := results.get(run.key)) is not None]
        rows[cell.method] += found
        for metric in (cell.metric, *cell.also):
            values: list[float | None] = [score_of(row, spec.split, metric) for row in found]
            if best is None and any(run.key in results for run in cell.trials):
                values = [None]  # every rate diverged
            scores.append(_score(spec, cell, best, metric, values))
    scores = [_marked(score, scores) for score in scores]
    costs = [
        Cost(
            method,
            _family(spec, method),
            entry.series,
            _most(rows[method], "trainable"),
            _most(rows[method], "checkpoint_bytes"),
            _median(rows[method], "step_seconds"),
            _most(rows[method], "peak_memory"),
        )
        for method, entry in spec.methods.items()
    ]
    return Table(scores, costs, spec.summary, spec.split, list(failures.values()))


def _score(spec: Comparison, cell: Cell, best: Run | None, metric: str, values: list[float | None]) -> Score:
    numbers = [value for value in values if value is not None]
    whole = numbers if numbers and len(numbers) == len(values) else []
    centre = getattr(statistics, spec.summary)(whole) if whole else None
    deviation = statistics.stdev(whole) if len(whole) > 1 else None
    rate = None if best is None else best.rate
    missing = len(cell.seeds) - len(values)
    decides = metric == cell.metric
    return Score(cell.task, cell.size, metric, cell.method, rate, values, centre, deviation, missing, decides)


def _marked(score: Score, scores: list[Score]) -> Score:
    sign = -1 if lower_is_better(score.metric) else 1
    rivals = [sign * s.centre for s in scores if s.column == score.column and s.centre is not None]
    best = score.centre is not None and len(rivals) > 1 and sign * score.centre == max(rivals)
    return replace(score, best=best)


def _family(spec: Comparison, method: str) -> str:
    if spec.methods[method].few_shot is not None:
        return "prompting"
    return family_of(spec.laid(next(iter(spec.tasks)), method).configuration())


def _most(rows: list[Row], name: str) -> int | None:
    return max((row[name] for row in rows if row.get(name) is not None), default=None)


def _median(rows: list[Row], name: str) -> float | None:
    found = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(found) if found else None
