"""Quality: LoRA against full fine-tuning on rotten_tomatoes, each at its best of three learning rates.

The learning rate is chosen on the validation rows with seed 0; the test rows are then scored over three
seeds. Every finished run is a line in results/quality_rotten_tomatoes.jsonl, so an interrupted benchmark
goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

import lorica
from lorica.train import DataConfig, Recipe, TrainingConfig, fit, prepare

DATA = Path(os.environ.get("LORICA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
LINES = harness.RESULTS / "quality_rotten_tomatoes.jsonl"
SEEDS = (0, 1, 2)
RATES = {"full fine-tuning": (5e-5, 1e-4, 2e-4), "lorica": (5e-4, 1e-3, 2e-3)}
TRAINING = TrainingConfig(epochs=1, batch_size=16, max_length=64, load_best=False, report_to=[])
METHOD = lorica.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run and what it scored."""

    method: str
    learning_rate: float
    seed: int
    settings: dict[str, Any]
    trainable: int
    steps: int
    seconds: float
    validation: float
    test: float


def main() -> None:
    """Choose the rates, run the seeds, publish."""
    options = harness.options(__doc__)
    chosen: dict[str, float] = {}
    runs: list[Run] = []
    for method, rates in RATES.items():
        trials = [once(method, rate, SEEDS[0], options.device) for rate in rates]
        chosen[method] = max(trials, key=lambda run: run.validation).learning_rate
        runs += trials + [once(method, chosen[method], seed, options.device) for seed in SEEDS[1:]]
    harness.publish(
        "quality_rotten_tomatoes",
        title="Quality on rotten_tomatoes",
        claim=claim(runs, chosen),
        tables=[final_table(runs, chosen), rates_table(runs)],
        data=[dataclasses.asdict(run) for run in runs],
        settings={
            "model": "MiniLM",
            "epochs": TRAINING.epochs,
            "batch": TRAINING.batch_size,
            "tokens a row, at most": TRAINING.max_length,
            "r": METHOD.r,
            "lora_alpha": METHOD.lora_alpha,
            "targets": METHOD.target_modules,
        },
        device=options.device,
    )


def once(method: str, learning_rate: float, seed: int, device: str) -> Run:
    """The run, from the file if it has been done before under the same settings."""
    place = {"use_cpu": device == "cpu"}
    training = dataclasses.replace(TRAINING, learning_rate=learning_rate, seed=seed, arguments=place)
    config = METHOD.to_dict() if method == "lorica" else None
    settings = {"method": config, "training": dataclasses.asdict(training)}
    for run in done():
        if run.method == method and run.settings == settings:
            return run
    run = train(method, training, settings)
    harness.note(LINES, run)
    scored = f"validation {100 * run.validation:.2f} %, test {100 * run.test:.2f} %"
    print(f"{method}, learning rate {learning_rate:g}, seed {seed}: {scored}", flush=True)
    return run


def done() -> Iterator[Run]:
    """The runs in the file."""
    return harness.noted(LINES, Run)


def train(method: str, training: TrainingConfig, settings: dict[str, Any]) -> Run:
    """Train once, from the pretrained encoder and a new head."""
    prepared = prepare(Recipe(data=rows(), training=training))
    model = prepared.model
    if method == "lorica":
        lorica.adapt(model, METHOD, seed=training.seed)
    splits = {name: encoded.features for name, encoded in prepared.splits.items()}
    learn, validation, test = splits["train"], splits["validation"], splits["test"]
    with tempfile.TemporaryDirectory() as output:
        result = fit(
            model, prepared.task, prepared.tokenizer, learn, validation, training, output, title=method
        )
        return Run(
            method=method,
            learning_rate=training.learning_rate or 0.0,  # `once` gave one
            seed=training.seed,
            settings=settings,
            trainable=lorica.trainable_parameters(model).trainable,
            steps=result.steps,
            seconds=round(result.seconds, 1),
            validation=result.evaluate(validation)["accuracy"],
            test=result.evaluate(test)["accuracy"],
        )


def rows() -> DataConfig:
    """The three splits."""
    folder = DATA / "rotten_tomatoes"
    if not folder.is_dir():
        raise SystemExit(f"no folder {folder}; set LORICA_DATA to the folder that holds rotten_tomatoes")
    train, validation, test = (str(folder / f"{split}.jsonl.gz") for split in ("train", "valid", "test"))
    return DataConfig(train=train, validation=validation, test=test)


def of(runs: list[Run], method: str, learning_rate: float) -> list[Run]:
    """The method's runs at a learning rate."""
    return [run for run in runs if (run.method, run.learning_rate) == (method, learning_rate)]


def mean(runs: list[Run]) -> float:
    """Mean test accuracy, in percent."""
    return 100 * statistics.mean(run.test for run in runs)


def claim(runs: list[Run], chosen: dict[str, float]) -> str:
    """What it comes to, in a sentence."""
    full, ours = (mean(of(runs, method, chosen[method])) for method in RATES)
    trainable = {run.method: run.trainable for run in runs}
    share = 100 * trainable["lorica"] / trainable["full fine-tuning"]
    return (
        f"LoRA trains {share:.1f} % of the parameters and gets {ours:.1f} % of the test rows right, full "
        f"fine-tuning {full:.1f} % ({ours - full:+.1f} points): the mean of {len(SEEDS)} seeds, each "
        "method at its best of three learning rates on the validation rows, same epochs."
    )


def final_table(runs: list[Run], chosen: dict[str, float]) -> dict[str, Any]:
    """Test accuracy at the chosen rates."""
    lines = []
    for method, rate in chosen.items():
        best = of(runs, method, rate)
        deviation = 100 * statistics.stdev(run.test for run in best)
        lines.append([method, f"{rate:g}", f"{best[0].trainable:,}", f"{mean(best):.2f} ± {deviation:.2f} %"])
    return {
        "caption": f"Test accuracy, mean ± standard deviation of {len(SEEDS)} seeds.",
        "columns": ["", "learning rate", "trainable parameters", "test accuracy"],
        "rows": lines,
    }


def rates_table(runs: list[Run]) -> dict[str, Any]:
    """Every learning rate that was tried."""
    first = [run for run in runs if run.seed == SEEDS[0]]
    return {
        "caption": f"All learning rates tried, seed {SEEDS[0]}.",
        "columns": ["", "learning rate", "validation accuracy"],
        "rows": [[run.method, f"{run.learning_rate:g}", f"{100 * run.validation:.2f} %"] for run in first],
    }


if __name__ == "__main__":
    main()
