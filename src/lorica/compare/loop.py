"""The comparison itself: choose each method's learning rate, run the seeds, skip finished runs.

Each run trains and is scored in its own process, so that its peak memory is its own.
"""

from __future__ import annotations

import datetime
import io
import shutil
import statistics
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import rich.console

from lorica.compare.check import check
from lorica.compare.file import Comparison
from lorica.compare.results import Results, Row, score_of
from lorica.compare.runs import Cell, Run, cells, choose
from lorica.compare.table import Table, summarise
from lorica.errors import LoricaError
from lorica.train.console import Console, duration, make_console
from lorica.train.record import versions
from lorica.train.run import train
from lorica.train.system import alone_in, in_new_process, peak_memory
from lorica.train.trainer.fit import Interrupted

RESULTS = "results.jsonl"


@dataclass
class _Progress:
    """Finished runs, runs left, and the time that they will take."""

    plan: list[Cell]
    results: Results
    console: rich.console.Console
    done: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    took: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def left(self) -> float | None:
        """Seconds until the end, from the duration of runs of the same method and task, the task, or any."""
        overall = [seconds for times in self.took.values() for seconds in times]
        if not overall:
            return None
        total = 0.0
        for cell in self.plan:
            same = [s for (task, _), times in self.took.items() if task == cell.task for s in times]
            times = self.took.get((cell.task, cell.method)) or same or overall
            total += self.missing(cell) * statistics.median(times)
        return total

    def missing(self, cell: Cell) -> int:
        """Runs of a cell that are not finished."""
        open_trials = [run for run in cell.trials if self._open(run)]
        if open_trials:
            return len(open_trials) + len(cell.seeds) - 1
        best = choose(cell, self.results)
        return sum(self._open(run) for run in cell.at(best)) if best is not None else 0

    def _open(self, run: Run) -> bool:
        return run.key not in self.results and run.key not in self.failures


def compare(
    spec: Comparison, *, console: rich.console.Console | None = None, in_process: bool = False
) -> Table:
    """Run the missing runs of a comparison, and summarise it.

    Each learning rate is tried with the first seed; the other seeds run with the rate that was best on the
    validation rows. A run that fails is reported and left out; it is tried again the next time.

    Args:
        spec: the comparison.
        console: shows progress. None makes one.
        in_process: run in this process instead of one per run; peak memory is then not measured.

    Returns:
        The table; `write_table` writes it.

    Raises:
        ConfigError: parts of it do not fit; nothing has run then. A metric that a task does not have is found
            when the task's first run ends.
        FileError: the rows cannot be read, or the output folder cannot be written.
    """
    console = console or make_console()
    metrics = check(spec)
    plan = cells(spec, metrics)
    with alone_in(spec.output, "comparison") as output:
        results = Results(output / RESULTS)
        progress = _Progress(plan, results, console)
        total = sum(cell.expected for cell in plan)
        missing = sum(map(progress.missing, plan))
        console.print(f"{total} runs, {total - missing} of them done; results in {output / RESULTS}")
        progress.done = total - missing
        for cell in plan:
            for trial in cell.trials:
                _obtain(trial, cell, progress, total, output, spec.keep, in_process)
            best = choose(cell, results)
            for run in cell.at(best) if best is not None else ():
                _obtain(run, cell, progress, total, output, spec.keep, in_process)
    return summarise(spec, plan, results, progress.failures)


def gather(spec: Comparison) -> Table:
    """Summarise the finished runs of a comparison, and run nothing.

    Raises:
        ConfigError: parts of it do not fit.
    """
    plan = cells(spec, check(spec))
    return summarise(spec, plan, Results(Path(spec.output) / RESULTS), {})


def _obtain(
    run: Run, cell: Cell, progress: _Progress, total: int, output: Path, keep: bool, in_process: bool
) -> None:
    if run.key in progress.results or run.key in progress.failures:
        return
    began = time.perf_counter()
    progress.done += 1
    place = f"[{progress.done}/{total}] {run}"
    try:
        row = (in_this_process if in_process else in_own_process)(run, output, keep=keep)
    except Failed as error:
        progress.failures[run.key] = f"{run}: {error}"
        progress.console.print(f"{place}: FAILED: {error}", markup=False, soft_wrap=True)
        return
    progress.results.add(row)
    seconds = time.perf_counter() - began
    progress.took.setdefault((cell.task, cell.method), []).append(seconds)
    left = progress.left()
    eta = "" if left is None else f"; {duration(left)} left"
    for metric in cell.also:
        for split in row["scores"]:
            _shown(row, split, metric)  # an unknown metric is reported now, not after all runs
    shown = ", ".join(f"{split} {_shown(row, split, cell.metric)}" for split in row["scores"])
    progress.console.print(
        f"{place}: {cell.metric} {shown} in {duration(seconds)}{eta}", markup=False, soft_wrap=True
    )


def _shown(row: Row, split: str, metric: str) -> str:
    value = score_of(row, split, metric)
    return "not a number" if value is None else f"{value:.4f}"


class Failed(LoricaError):
    """A run ended without a result."""


def in_own_process(run: Run, folder: Path, *, keep: bool = False) -> Row:
    """Do a run in a fresh process, whose peak memory is then the run's.

    Args:
        run: the run.
        folder: of the comparison; the run's own is in it, and a run that was killed continues there.
        keep: whether the run's folder stays.

    Raises:
        Failed: the run failed, or its process was killed.
        KeyboardInterrupt: the user stopped it.
    """
    try:
        row, reason = in_new_process(_attempt, run, folder, keep)
    except BrokenProcessPool:
        reason = "its process was killed, most likely because the machine ran out of memory"
        raise Failed(reason) from None
    if row is None and reason is None:
        raise KeyboardInterrupt
    if row is None:
        raise Failed(reason)
    return row


def in_this_process(run: Run, folder: Path, *, keep: bool = False) -> Row:
    """Do a run here; its peak memory is not known then. As `in_own_process` otherwise."""
    row, reason = _attempt(run, folder, keep)
    if row is None and reason is None:
        raise KeyboardInterrupt
    if row is None:
        raise Failed(reason)
    return {**row, "peak_memory": None}


def _attempt(run: Run, folder: Path, keep: bool) -> tuple[Row | None, str | None]:
    """The run's line, or the reason why there is none; neither after Ctrl-C."""
    try:
        return perform(run, folder, keep=keep), None
    except (Interrupted, KeyboardInterrupt):
        return None, None
    except LoricaError as error:
        return None, str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return None, f"{type(error).__name__}: {error} ({place})".replace("\n", " ")


def perform(run: Run, folder: Path, *, keep: bool = False) -> Row:
    """Train and score, or prompt and score."""
    recipe, own = run.recipe, folder / "runs" / run.key
    if run.few_shot is not None:
        from lorica.compare.prompting import prompt

        found = prompt(recipe, run.few_shot)
    else:
        result = train(recipe.replace(output=str(own)), resume=True, console=Console(file=io.StringIO()))
        found = {
            "scores": result.metrics,
            "trainable": result.trainable,
            "parameters": result.parameters,
            "checkpoint_bytes": result.checkpoint_bytes,
            "steps": result.steps,
            "step_seconds": result.step_seconds,
            "seconds": result.seconds,
            "rows": result.rows,
        }
    if keep and own.is_dir():
        shutil.rmtree(own / "checkpoints", ignore_errors=True)
    else:
        shutil.rmtree(own, ignore_errors=True)
    return {
        "key": run.key,
        "task": run.task,
        "method": run.method,
        "learning_rate": run.rate,
        "seed": run.seed,
        **found,
        "peak_memory": peak_memory(),
        "recipe": run.recipe.to_dict(),
        "versions": versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
