"""A search on rotten_tomatoes: what LoRA's tutorials search, by one command, against the recipe as it comes.

20 trials of `recipes/spaces/tutorials.yaml` around `recipes/sentiment.yaml`, by successive halving, each on a
part of the training rows so that a processor gets through them in half an hour; all of the validation rows
decide. Then the recipe's own values get the same rows and epochs, and both train with two more seeds. All of
it is kept in runs/, and an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from quality_rotten_tomatoes import rows

from lorica.cli import main as lorica
from lorica.train import Recipe, train
from lorica.tune import Goal, Record, SearchConfig, reopen
from lorica.tune.figures import FIGURES, importance
from lorica.tune.journal import JOURNAL, Journal
from lorica.tune.progress import ranked
from lorica.tune.searching import BEST, best_of

HOME = Path(__file__).resolve().parents[1]
RECIPE, SPACE = HOME / "recipes" / "sentiment.yaml", HOME / "recipes" / "spaces" / "tutorials.yaml"
TRIALS, ROWS, EPOCHS = 20, 1000, 10
TESTED = 1066  # rows to test on, and as many to validate on
SEEDS = (0, 1, 2)
PLOTS = {
    "scores": "Each trial's validation accuracy over its epochs; the best in blue.",
    "coordinates": "Each trial's values; the lighter, the better.",
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One call of the search's command; one that is killed leaves none."""

    seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """Values trained with one seed, and what the best checkpoint scored."""

    values: str
    seed: int
    parameters: int
    validation: float
    test: float


def main() -> None:
    """Search, train what it is compared with, publish."""
    harness.options(__doc__)
    folder = HOME / "runs" / f"search_rotten_tomatoes-{TRIALS}x{ROWS}"
    command = search(folder)
    _, space, config = reopen(folder / "search")
    goal = Goal("accuracy", "max")
    records = list(Journal(folder / "search" / JOURNAL).records.values())
    best = best_of(records, goal)
    if best is None:
        raise SystemExit(f"no trial finished; see {folder / 'search'}")
    found = Recipe.load(folder / "search" / BEST / "recipe.yaml")
    default = part().replace(training={"epochs": EPOCHS})
    runs = [once(folder, "the recipe's", default, seed) for seed in SEEDS]
    runs += [own(best), *(once(folder, "the best trial's", found, seed) for seed in SEEDS[1:])]
    shares = importance(records, space, goal)
    turns = [turn.seconds for turn in harness.noted(folder / "turns.jsonl", Turn)]
    text = claim(records, best, runs, shares, command, sum(turns))
    print(text)
    harness.publish(
        "search_rotten_tomatoes",
        title="A search against the recipe as it comes",
        claim=text,
        tables=[runs_table(runs), trials_table(records, goal, pictures(folder))],
        data={
            "trials": [dataclasses.asdict(record) for record in records],
            "runs": [dataclasses.asdict(run) for run in runs],
            "importance": shares,
            "seconds": turns,
        },
        settings=settings(config),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def part() -> Recipe:
    """The recipe, on some of the training rows and all that are to validate and test on."""
    whole = Recipe.load(RECIPE).replace(data=rows())
    return whole.replace(data={"train_rows": ROWS}, training={"bf16": True})


def search(folder: Path) -> str:
    """Search, or go on searching; returns the command that began it."""
    recipe, out = folder / "sentiment.yaml", folder / "search"
    rules = {"trials": TRIALS, "scheduler": "asha", "max_t": EPOCHS, "grace_period": 1, "reduction_factor": 2}
    flags = [text for name, value in rules.items() for text in (f"--{name}", str(value))]
    start = ["tune", str(recipe), "--space", str(SPACE), *flags, "--output", str(out)]
    begun = (out / "search.json").exists()
    if not begun:
        folder.mkdir(parents=True, exist_ok=True)
        part().save(recipe)
    clock = time.perf_counter()
    if lorica(["tune", "--resume", str(out)] if begun else start):
        raise SystemExit(f"the search failed; see {out}")
    seconds = time.perf_counter() - clock
    if seconds > 60:  # one that is whole already returns at once
        harness.note(folder / "turns.jsonl", Turn(round(seconds, 1)))
    return shlex.join(["lorica", "tune", recipe.name, "--space", str(SPACE.relative_to(HOME)), *flags])


def own(best: Record) -> Run:
    """What the best trial came to in the search itself."""
    validation, test = (best.metrics[split]["accuracy"] for split in ("validation", "test"))
    return Run("the best trial's", SEEDS[0], trained(best), validation, test)


def once(folder: Path, values: str, recipe: Recipe, seed: int) -> Run:
    """A run, from the file if it has been done before."""
    for run in harness.noted(folder / "runs.jsonl", Run):
        if (run.values, run.seed) == (values, seed):
            return run
    output = str(folder / f"{values.replace(' ', '-')}-{seed}")
    result = train(recipe.replace(training={"seed": seed}, output=output), resume=True)
    scores = (result.metrics[split]["accuracy"] for split in ("validation", "test"))
    run = Run(values, seed, result.trainable, *scores)
    harness.note(folder / "runs.jsonl", run)
    return run


def trained(record: Record) -> int:
    """How many parameters a trial trains, its head's included."""
    return int(record.evaluations[-1].metrics["parameters"])


def of(runs: Sequence[Run], values: str) -> list[Run]:
    """The runs with some values, by seed."""
    return [run for run in runs if run.values == values]


def mean(runs: Sequence[Run], split: str) -> float:
    """Mean accuracy over seeds, in percent."""
    return 100 * statistics.mean(getattr(run, split) for run in runs)


def claim(
    records: Sequence[Record],
    best: Record,
    runs: Sequence[Run],
    shares: dict[str, float],
    command: str,
    seconds: float,
) -> str:
    """What it comes to."""
    found, given = of(runs, "the best trial's"), of(runs, "the recipe's")
    spent = sum(each.evaluations[-1].epoch for each in records if each.evaluations)
    finished = sum(record.status == "finished" for record in records)
    right = mean(given, "test") / 100
    error = 100 * math.sqrt(right * (1 - right) / TESTED)
    important = ", ".join(f"{name.rpartition('.')[2]} {100 * share:.0f} %" for name, share in shares.items())
    return (
        f"`{command}`, where sentiment.yaml is recipes/sentiment.yaml with {ROWS:,} of the 8,530 training "
        f"rows and bf16: {len(records)} trials in {seconds / 60:.0f} minutes on a busy machine, {finished} "
        f"to the end of their {EPOCHS} epochs, {spent:.0f} epochs in all. The best (trial {best.name}) gets "
        f"{100 * found[0].validation:.2f} % of the validation rows right; the recipe's own values, on the "
        f"same rows, for as many epochs and with the same seed, {100 * given[0].validation:.2f} % "
        f"({100 * (found[0].validation - given[0].validation):+.2f} points). But the validation rows chose "
        f"it among {len(records)} trials. Over {len(SEEDS)} seeds of each the means are "
        f"{mean(found, 'validation'):.2f} and {mean(given, 'validation'):.2f} % there, and on the test rows, "
        f"which chose nothing, {mean(found, 'test'):.2f} and {mean(given, 'test'):.2f} %, where the standard "
        f"error of one score is {error:.1f}; with {found[0].parameters:,} trained parameters against "
        f"{given[0].parameters:,}. What explains the trials' scores (fANOVA): {important}."
    )


def runs_table(runs: Sequence[Run]) -> dict[str, Any]:
    """The best trial's values and the recipe's own, over seeds."""
    lines = []
    for values in dict.fromkeys(run.values for run in runs):
        own = of(runs, values)
        scores = [
            f"{mean(own, split):.2f} % ({', '.join(f'{100 * getattr(run, split):.2f}' for run in own)})"
            for split in ("validation", "test")
        ]
        lines.append([values, f"{own[0].parameters:,}", *scores])
    return {
        "caption": f"Accuracy of the best checkpoint, mean of {len(SEEDS)} seeds (each). The first seed of "
        "the best trial's values is the trial itself.",
        "columns": ["values", "trained parameters", "validation", "test"],
        "rows": lines,
    }


def trials_table(records: Sequence[Record], goal: Goal, figures: str) -> dict[str, Any]:
    """A row a trial, the best first, below the figures."""
    fields = list(records[0].values)
    lines = []
    for record in ranked(records, goal):
        at = record.at_best(goal.metric, goal.mode)
        lines.append(
            [
                record.name,
                *(shown(record.values[name]) for name in fields),
                f"{trained(record):,}",
                len(record.evaluations),
                record.status,
                "" if at is None else f"{100 * at.metrics[goal.metric]:.2f} % (after {at.time})",
            ]
        )
    names = [name.rpartition(".")[2] for name in fields]
    return {
        "caption": "The trials, by their best validation accuracy." + figures,
        "columns": ["trial", *names, "trained parameters", "epochs", "status", "validation"],
        "rows": lines,
    }


def shown(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def pictures(folder: Path) -> str:
    """Copies the figures beside the results; returns their places in the report."""
    harness.RESULTS.mkdir(exist_ok=True)
    text = ""
    for name, caption in PLOTS.items():
        target = f"search_rotten_tomatoes.{name}.png"
        shutil.copyfile(folder / "search" / FIGURES / f"{name}.png", harness.RESULTS / target)
        text += f"\n\n![{caption}](results/{target})"
    return text


def settings(config: SearchConfig) -> dict[str, Any]:
    """How it was measured."""
    return {
        "model": "MiniLM",
        "space": f"recipes/spaces/{SPACE.name}",
        "trials": config.trials,
        "at once": config.slots,
        "training rows": ROWS,
        "epochs, at most": EPOCHS,
        "seeds": len(SEEDS),
    }


if __name__ == "__main__":
    main()
