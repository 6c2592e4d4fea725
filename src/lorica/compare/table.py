"""A comparison's outcome: scores, costs, and the table that they make."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from lorica.compare.check import lower_is_better
from lorica.train.console import size

NONE = "–"
NO_SHARE = ("nist", "cider")
"""Metrics that may be below 1 and are no share of anything: their scale has no end."""


@dataclass(frozen=True)
class Score:
    """What a method came to on a task.

    Args:
        task: name of the task.
        size: training rows that were drawn, or None for all.
        metric: what is shown.
        method: name of the method.
        learning_rate: the best, or None.
        values: the metric of each seed that has a result; None where it is no number.
        centre: their mean or median; None if there is none, or one of them is no number.
        deviation: their standard deviation (of a sample); None of fewer than two.
        missing: seeds without a result.
        decides: whether it is what the task is judged by, and not only shown.
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
        """Where it stands in the table."""
        rows = "" if self.size is None else f", n = {self.size:,}"
        return f"{self.task}{rows} ({self.metric})"

    @property
    def is_share(self) -> bool:
        """Whether it reads best as per cent: a metric that ends at 1, such as accuracy."""
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
    """What a method costs, over its runs with the best learning rates.

    Args:
        method: its name.
        family: selective, reparametrisation, additive, or prompting.
        series: of the plot.
        trainable: parameters that train, a new head included; the most of any task.
        checkpoint_bytes: what must be stored beside the base; likewise.
        step_seconds: median over runs of the median seconds a step.
        peak_memory: largest memory of a run's process; None where runs shared one.
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
    """A comparison's outcome.

    Args:
        scores: one for each method, task and size.
        costs: one for each method.
        summary: ``"mean"`` or ``"median"``.
        split: the rows that were scored.
        failures: what went wrong, a line a run.
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
        """Those that the tasks are judged by."""
        return [score for score in self.scores if score.decides]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings, and a row of cells a method; the best of a column between asterisks."""
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
        """Mean over what the tasks are judged by, in per cent; None if one is missing."""
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
        """What the figures are."""
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
