"""Trains in forked processes, kills each somewhere, resumes it, and says what became of the adapters.

Called by test_run.py in a process of `ranks`, of which each run is a fork: no imports are paid.
"""

from __future__ import annotations

import gc
import hashlib
import io
import os
import random
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from train import tiny

from lorica.train import Trainer, train


def in_child(action: Callable[[], None]) -> int:
    """Do something in a forked process; returns the signal that ended it, or minus its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth_call(owner: Any, name: str, n: int, *, after: bool) -> None:
    """Die at the n-th call of a function, before or after it does its work."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n and not after:
            die()
        result = original(*args, **options)
        if calls == n:
            die()
        return result

    setattr(owner, name, counted)


_DEADLY = """
import os, signal
from pathlib import Path
from lorica.train.tasks import SequenceClassification

class Deadly(SequenceClassification):
    name = "deadly"

    def metrics(self, outcome, features):
        seen = Path({marks!r}, os.environ["RANK"])
        seen.write_text(seen.read_text() + "." if seen.exists() else ".")
        if os.environ["RANK"] == "1" and seen.read_text() == "...":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["RANK"] == "1" and Path({marks!r}, "fail").exists():
            raise RuntimeError("out of memory on one of them")
        return super().metrics(outcome, features)
"""


def deadly_task(folder: Path) -> tuple[str, Path]:
    """A task, as a recipe names it, whose second process dies when it is asked for scores the third time.

    Returns:
        The task, and a folder of marks: a file for each process with a point for each time that it was asked.
        Where the folder has a file ``fail``, the second process fails.
    """
    task, marks = folder / "task.py", folder / "marks"
    marks.mkdir()
    task.write_text(_DEADLY.format(marks=str(marks)))
    return f"{task}:Deadly", marks


def truncated_state(n: int) -> None:
    """Die in the middle of writing the n-th trainer_state.json."""
    calls = 0

    def save(self: Any, json_path: str) -> None:
        nonlocal calls
        calls += 1
        if calls == n:
            Path(json_path).write_text('{"global_step": ')
            die()
        original(self, json_path)

    original = transformers.TrainerState.save_to_json
    transformers.TrainerState.save_to_json = save


def kills_and_resumes(folder: str | Path) -> dict[str, list[Any]]:
    """How each kill, by its name, ended the run and its resumption, and whether the adapter is the same."""
    folder = Path(folder)
    model, data = tiny.write_model(folder / "model"), tiny.write_data(folder / "data")
    silent = Console(file=io.StringIO())

    def run(name: str, *, best: bool, resume: bool = False) -> None:
        # With a checkpoint every third step; ending with the last weights, or with the best, which are older.
        recipe = tiny.recipe(model, data, folder / name, save_steps=3, load_best=best)
        train(recipe, resume=resume, console=silent)

    draw = random.Random(7)
    step = Trainer.training_step.__qualname__.split(".")[-1]
    kills: dict[str, Callable[[], None]] = {
        f"step {n}": lambda n=n: nth_call(Trainer, step, n, after=n % 2 == 0)
        for n in draw.sample(range(1, 21), 5)
    }
    kills |= {
        "adapter saved, optimizer not": lambda: nth_call(torch, "save", 4, after=False),
        "optimizer saved, state not": lambda: nth_call(Trainer, "_save_rng_state", 3, after=True),
        "state half written": lambda: truncated_state(3),
        "validation after the last step": lambda: nth_call(Trainer, "evaluate", 2, after=True),
        "before the adapter is written": lambda: nth_call(Trainer, "predict", 2, after=True),
    }
    outcome: dict[str, Any] = {}
    gc.freeze()  # else each fork walks, and so copies, all that was imported
    for best in (False, True):
        assert in_child(lambda best=best: run(f"whole-{best}", best=best)) == 0
    for i, (name, arm) in enumerate(kills.items()):
        best = "validation" in name or "before" in name

        def killed(arm: Callable[[], None] = arm, i: int = i, best: bool = best) -> None:
            arm()
            run(f"killed{i}", best=best)

        signals = in_child(killed), in_child(lambda i=i, best=best: run(f"killed{i}", best=best, resume=True))
        outcome[name] = [*signals, digest(folder / f"killed{i}") == digest(folder / f"whole-{best}")]
    assert digest(folder / "whole-True") != digest(folder / "whole-False"), (
        "the best weights are the last ones"
    )
    return outcome


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
