"""Which learning rate a method runs its seeds with."""

from __future__ import annotations

from lorica.compare.check import lower_is_better
from lorica.compare.results import Results, score_of
from lorica.compare.runs import Cell, Run


def choose(cell: Cell, results: Results) -> Run | None:
    """The trial that was best on the validation rows; None as long as none has a result.

    A score that is no number never wins; of equals the first given does. Where there is one trial, there is
    nothing to choose.

    Raises:
        ConfigError: the metric is none that the runs have.
    """
    tried = [(run, row) for run in cell.trials if (row := results.get(run.key)) is not None]
    if len(cell.trials) == 1:
        return tried[0][0] if tried else None
    sign = -1 if lower_is_better(cell.metric) else 1
    best: tuple[float, Run] | None = None
    for run, row in tried:
        value = score_of(row, "validation", cell.metric)
        if value is not None and (best is None or sign * value > best[0]):
            best = sign * value, run
    return None if best is None else best[1]
