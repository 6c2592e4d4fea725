"""From finished runs to the table: centre and spread over the seeds, what trained, and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from lorica.compare.check import lower_is_better
from lorica.compare.choice import choose
from lorica.compare.file import Comparison
from lorica.compare.results import Results, Row, score_of
from lorica.compare.runs import Cell, Run
from lorica.compare.table import Cost, Score, Table
from lorica.config import family_of


def summarise(spec: Comparison, plan: Sequence[Cell], results: Results, failures: dict[str, str]) -> Table:
    """Put the finished runs of a comparison into its table.

    Raises:
        ConfigError: a task's metric is none that its runs have.
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
