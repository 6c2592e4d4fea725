"""What a recipe that leaves everything open gives on few rows, beside three passes at one rate for all.

Rows are the shared data sets, cut to the sizes of GLUE's small tasks. Every finished run is a line in
results/defaults.jsonl, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import harness

from lorica.train import DataConfig, Recipe, TrainingConfig, train

DATA = Path(os.environ.get("LORICA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
LINES = harness.RESULTS / "defaults.jsonl"
# A size → the data set, how many of its rows to learn from, and how many to score (None: all there are).
SIZES: dict[str, tuple[str, int, int | None]] = {
    "400 reviews": ("rotten_tomatoes", 400, 400),
    "RTE": ("rte", 2_490, None),
    "as MRPC: inference": ("mnli_subset", 3_668, 400),
    "as CoLA: reviews": ("sst2", 8_551, 400),
}
BEFORE = "three passes at 5e-4"
AFTER = "as chosen"
SETTINGS: dict[str, dict[str, Any]] = {BEFORE: {"epochs": 3.0, "learning_rate": 5e-4}, AFTER: {}}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run and what it scored on its validation rows."""

    size: str
    setting: str
    seed: int
    rows: int
    learning_rate: float
    steps: int
    seconds: float
    accuracy: float
    majority: float
    warnings: list[str]


def main() -> None:
    """Run what is missing, publish."""
    options = harness.options(__doc__)
    runs = [once(size, setting, 0, options.device) for size in SIZES for setting in SETTINGS]
    harness.publish(
        "defaults",
        title="What the defaults give",
        claim="A recipe that names data alone trains long enough to learn, also on a few hundred rows. The "
        "number of steps has a floor, and the learning rate follows the model's width; before, every recipe "
        f"took {BEFORE}. Accuracy on up to 400 validation rows, one seed.",
        tables=[table(runs)],
        data=[dataclasses.asdict(run) for run in runs],
        settings={"model": "MiniLM", "method": "LoRA r=8, all-linear, alpha 16", "tokens a row, at most": 64},
        device=options.device,
    )


def once(size: str, setting: str, seed: int, device: str) -> Run:
    """The run, from the file if it has been done before."""
    for run in harness.noted(LINES, Run):
        if (run.size, run.setting, run.seed) == (size, setting, seed):
            return run
    name, rows, scored = SIZES[size]
    files = {split: str(DATA / name / f"{split}.jsonl.gz") for split in ("train", "valid")}
    training = TrainingConfig(
        seed=seed,
        max_length=64,
        report_to=[],
        arguments={"use_cpu": device == "cpu"},
        **SETTINGS[setting],
    )
    data = DataConfig(
        train=files["train"], validation=files["valid"], train_rows=rows, validation_rows=scored
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(Recipe(data=data, training=training, output=f"{folder}/run"))
    run = Run(
        size=size,
        setting=setting,
        seed=seed,
        rows=result.rows["train"],
        learning_rate=result.chosen.get("learning_rate", training.learning_rate or 0.0),
        steps=result.steps,
        seconds=round(result.seconds, 1),
        accuracy=result.metrics["validation"]["accuracy"],
        majority=result.majority["validation"]["accuracy"],
        warnings=list(result.warnings),
    )
    harness.note(LINES, run)
    print(f"{size}, {setting}: {100 * run.accuracy:.1f} % in {run.steps} steps", flush=True)
    return run


def table(runs: list[Run]) -> dict[str, Any]:
    """A row per size."""
    rows = []
    for size in SIZES:
        both = {run.setting: run for run in runs if run.size == size}
        before, after = both[BEFORE], both[AFTER]
        rows.append(
            [
                size,
                f"{before.rows:,}",
                f"{100 * before.majority:.1f} %",
                *(f"{100 * run.accuracy:.1f} % ({run.steps:,} steps)" for run in (before, after)),
                f"{after.learning_rate:g}",
            ]
        )
    return {
        "caption": "Accuracy on validation rows",
        "columns": ["rows", "to learn from", "largest class", BEFORE, AFTER, "rate chosen"],
        "rows": rows,
    }


if __name__ == "__main__":
    main()
