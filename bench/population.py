"""Eight adapters trained together over one base, one after another, and in processes of Ray's.

Ray has three ways: as many processes as processors, each with a population of its share of the trials; as
many, each of which takes one trial after another; and, like the population, all eight side by side.

Every way is a process of its own, timed from its start to its end, imports included; memory is what the
process and its children hold together (proportional set size: what they share counts once), at its highest.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import psutil
import torch
from rich.console import Console

from lorica import LoraConfig
from lorica.errors import require
from lorica.train import DataConfig, Recipe, TrainingConfig
from lorica.train.console import quiet
from lorica.train.embedded import docstrings

TRIALS, STEPS, BATCH, LENGTH = 8, 60, 4, 32
VALIDATION = 32
CORES = len(os.sched_getaffinity(0))
RANKS = (1, 2, 4, 8)
RATES = (2e-4, 1e-3)


def recipe(folder: Path) -> Recipe:
    """MiniLM on Python's docstrings, four rows of at most 32 tokens a step, few to validate on."""
    rows = docstrings()
    data = folder / "data"
    data.mkdir()
    with quiet():
        rows["train"].to_json(data / "train.jsonl")
        rows["validation"].select(range(VALIDATION)).to_json(data / "validation.jsonl")
    return Recipe(
        data=DataConfig(train=str(data)),
        method=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"),
        training=TrainingConfig(
            max_steps=STEPS, batch_size=BATCH, max_length=LENGTH, report_to=[], load_best=False
        ),
    )


SPACE: dict[str, Any] = {
    "method.r": {"choice": list(RANKS)},
    "method.lora_alpha": {"tied": "2*r"},
    "training.learning_rate": {"choice": list(RATES)},
}


def base(folder: Path) -> None:
    """Nothing but the base, its rows, and what it takes to train: the least that any way holds."""
    from lorica.train.run import prepare

    prepared = prepare(recipe(folder))
    for parameter in prepared.model.parameters():
        parameter.sum()


def in_a_row(folder: Path) -> None:
    """`lorica.train.train`, eight times."""
    from lorica.train import train
    from lorica.tune import Space

    space, shared = Space(SPACE), recipe(folder)
    for i, values in enumerate(space.grid()):
        made = space.recipe(shared, values)
        train(made.replace(output=str(folder / str(i))), console=Console(file=io.StringIO()))


def searched(folder: Path, engine: str, slots: int, cpus: float = 1.0) -> None:
    """A grid of eight by one of the engines."""
    from lorica.tune import SearchConfig, search

    config = SearchConfig(
        algorithm="grid", scheduler="none", engine=engine, slots=slots, resources={"cpu": cpus}
    )
    found = search(recipe(folder), SPACE, folder / "search", config, console=Console(file=io.StringIO()))
    assert [record.status for record in found.records] == ["finished"] * TRIALS, found.records


WAYS = {
    "the base alone": base,
    "together": lambda folder: searched(folder, "population", TRIALS),
    "in a row": in_a_row,
    "Ray, a population a processor": lambda folder: searched(folder, "ray", TRIALS),
    "Ray, a trial a processor": lambda folder: searched(folder, "ray", CORES),
    "Ray, all at once": lambda folder: searched(folder, "ray", TRIALS, CORES / TRIALS),
}


def main() -> None:
    """Run every way in turns, and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=list(WAYS), help="run one way in this process, unmeasured")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.way is not None:
        with tempfile.TemporaryDirectory() as folder:
            WAYS[chosen.way](Path(folder))
        return
    require("ray", extra="tune")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(chosen.rounds):
        for way in WAYS if turn == 0 else list(WAYS)[1:]:
            took, peak = measured(way)
            seconds[way].append(took)
            peaks[way].append(peak)
            print(f"{way}: {took:.1f} s, {peak:,.0f} MB", flush=True)
    wall = {way: statistics.median(figures) for way, figures in seconds.items()}
    memory = {way: statistics.median(figures) for way, figures in peaks.items()}
    ray = "Ray, all at once"
    rows = [
        [
            way,
            f"{wall[way]:.1f} s",
            f"{wall[ray] / wall[way]:.2f}×",
            f"{memory[way]:,.0f} MB",
            f"{memory[way] / memory[ray]:.2f}",
        ]
        for way in list(WAYS)[1:]
    ]
    torch.set_num_threads(CORES)
    harness.publish(
        "population",
        title="Many adapters at once",
        claim=(
            f"{TRIALS} adapters on MiniLM, {STEPS} steps of {BATCH} rows of at most {LENGTH} tokens each, "
            f"with {VALIDATION} rows to validate on at the end. Trained together they take "
            f"{wall['together'] / wall[ray]:.2f} of the time and {memory['together'] / memory[ray]:.2f} of "
            f"the memory of eight processes of Ray's side by side, and "
            f"{wall['together'] / wall['in a row']:.2f} of the time of one after another. The base, its rows "
            f"and the libraries alone are {memory['the base alone']:,.0f} MB."
        ),
        tables=[
            {
                "caption": f"Whole processes, imports included; turns of each: {chosen.rounds}",
                "columns": ["", "time", "all at once over it", "peak memory", "of all at once"],
                "rows": rows,
            }
        ],
        data={"seconds": seconds, "megabytes": peaks},
        settings={"trials": TRIALS, "steps": STEPS, "batch": BATCH, "tokens": LENGTH, "turns": chosen.rounds},
        device="cpu",
    )


def measured(way: str) -> tuple[float, float]:
    """Seconds and the highest memory in MB of a process that goes one way."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, __file__, "--way", way]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, held(watched))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{way} failed")
    return time.perf_counter() - start, peak / 1e6


def held(process: psutil.Process) -> int:
    """Proportional set size in bytes of a process and all its descendants."""
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


if __name__ == "__main__":
    main()
