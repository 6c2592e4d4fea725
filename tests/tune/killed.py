"""Trains a population in forked processes, kills each somewhere, resumes it, and says what became of it.

Called by test_killed.py in a process of `ranks`, of which each run is a fork: no imports are paid.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from train import tiny
from train.killed import digest, in_child, nth_call

from lorica.train import Trainer
from lorica.tune import Goal, Halving, Population
from lorica.tune.journal import Journal


def kills_and_resumes(folder: str | Path) -> dict[str, list[Any]]:
    """How each kill, by its name, ended the search and its resumption, and whether they come to the same."""
    folder = Path(folder)
    model, data = tiny.write_model(folder / "model"), tiny.write_data(folder / "data")
    recipe = tiny.recipe(model, data, folder, epochs=2, save_steps=2, batch_size=8)
    rates = {f"{rate:g}": rate for rate in (3e-3, 1e-9, 2e-3)}

    def run(name: str, *, resume: bool = False) -> None:
        Population(
            {key: recipe.replace(training={"learning_rate": rate}) for key, rate in rates.items()},
            folder / name,
            slots=2,
            scheduler=Halving(max_t=2),
            goal=Goal("loss", "min"),
            console=Console(file=io.StringIO()),
        ).run(resume=resume)

    def outcome(name: str) -> dict[str, Any]:
        records = Journal(folder / name / "results.jsonl").records
        return {
            key: [
                record.status,
                [(each.step, each.metrics, each.stops) for each in record.evaluations],
                digest(folder / name / "trials" / key) if record.status == "finished" else None,
            ]
            for key, record in records.items()
        }

    kills: dict[str, Callable[[], None]] = {
        "in a step": lambda: nth_call(Trainer, "training_step", 7, after=False),
        "evaluation written, checkpoint not": lambda: nth_call(Journal, "evaluated", 2, after=True),
        "trial ended, but not written down": lambda: nth_call(Journal, "ended", 1, after=False),
        "optimizer saved, state not": lambda: nth_call(Trainer, "_save_rng_state", 5, after=True),
    }
    assert in_child(lambda: run("whole")) == 0
    whole = outcome("whole")
    assert {status for status, *_ in whole.values()} == {"finished", "stopped"}, whole
    said: dict[str, Any] = {}
    for i, (name, arm) in enumerate(kills.items()):

        def killed(arm: Callable[[], None] = arm, i: int = i) -> None:
            arm()
            run(f"killed{i}")

        signals = in_child(killed), in_child(lambda i=i: run(f"killed{i}", resume=True))
        said[name] = [*signals, outcome(f"killed{i}") == whole]
    return said
