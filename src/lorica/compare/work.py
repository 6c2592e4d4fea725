"""One run: trained and scored in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import datetime
import io
import shutil
import traceback
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from lorica.compare.results import Row
from lorica.compare.runs import Run
from lorica.errors import LoricaError
from lorica.train.apart import apart
from lorica.train.console import Console
from lorica.train.fitting import Interrupted
from lorica.train.memory import peak_memory
from lorica.train.record import versions
from lorica.train.run import train


class Failed(LoricaError):
    """A run ended without a result."""


def in_own_process(run: Run, folder: Path, *, keep: bool = False) -> Row:
    """Do a run in a fresh process, whose peak memory is then the run's.

    Args:
        run: the run.
        folder: of the comparison; the run's own is inside, and a run that was killed goes on in it.
        keep: whether the run's folder stays.

    Raises:
        Failed: the run did, or its process was killed.
        KeyboardInterrupt: the user stopped it.
    """
    try:
        row, reason = apart(_attempt, run, folder, keep)
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
    """The run's line, or why there is none; neither of them after Ctrl-C."""
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
