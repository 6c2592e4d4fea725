"""Quality: the paper's methods, each at its best of three learning rates, over three seeds.

    python bench/compare_methods.py classification       280 runs on four tasks of texts
    python bench/compare_methods.py generation           40 runs on E2E

Runs recipes/compare/classification.yaml or generation.yaml as far as it has not run, and publishes the tasks
whose runs are all there. A run takes a minute or two on one core: stop it and start it again as you like.
Finished runs are lines of results/compare_classification.jsonl or compare_generation.jsonl too, in which
several folders (``--output``) come together, each with tasks of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import harness
import torch
from orderings import ordering, tally

from lorica.compare import Comparison, Table, compare, gather, write_table
from lorica.compare.check import check
from lorica.compare.results import Results
from lorica.compare.runs import cells

DATA = Path(os.environ.get("LORICA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
FILES = Path(__file__).resolve().parents[1] / "recipes" / "compare"
TITLES = {
    "classification": "The paper's methods on classification and regression",
    "generation": "The paper's methods on writing",
}


def main() -> None:
    """Run what is asked for, publish what is whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", choices=list(TITLES), help="which comparison")
    parser.add_argument("--tasks", nargs="+", help="names of the file's tasks to run (default: all)")
    parser.add_argument("--output", help="folder for the runs' results (default: the file's)")
    parser.add_argument("--publish", action="store_true", help="run nothing, publish what is there")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: one a core)")
    chosen = parser.parse_args()
    if chosen.threads:
        os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # each run's own process reads it
        torch.set_num_threads(chosen.threads)
    if not DATA.is_dir():
        raise SystemExit(f"no folder {DATA}; set LORICA_DATA to the folder that holds rotten_tomatoes")
    changes = {"output": chosen.output} if chosen.output else {}
    spec = Comparison.load(FILES / f"{chosen.file}.yaml", data=str(DATA), **changes)
    lines = harness.RESULTS / f"compare_{chosen.file}.jsonl"
    exchange(lines, Path(spec.output) / "results.jsonl")
    if not chosen.publish:
        compare(only(spec, chosen.tasks or list(spec.tasks)))
        exchange(lines, Path(spec.output) / "results.jsonl")
    whole = [task for task in spec.tasks if is_whole(only(spec, [task]))]
    if not whole:
        raise SystemExit("not written: no task has all its runs yet")
    publish(chosen.file, gather(only(spec, whole)), spec, whole)


def exchange(kept: Path, folder: Path) -> None:
    """Give each of two files of finished runs the other's lines; the kept one names no paths."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = Results(kept), Results(folder)
    for key, row in theirs.rows.items():
        if key not in ours:
            ours.add({name: value for name, value in row.items() if name != "recipe"})
    for key, row in ours.rows.items():
        if key not in theirs:
            theirs.add(row)


def only(spec: Comparison, tasks: list[str]) -> Comparison:
    """The comparison on some of its tasks."""
    unknown = [task for task in tasks if task not in spec.tasks]
    if unknown:
        raise SystemExit(f"there is no task {unknown[0]!r}; there are: {', '.join(spec.tasks)}")
    return dataclasses.replace(spec, tasks={task: spec.tasks[task] for task in tasks})


def is_whole(spec: Comparison) -> bool:
    """Whether every method has a result of every learning rate, and of every seed at the best."""
    done = Results(Path(spec.output) / "results.jsonl")
    tried = all(run.key in done for cell in cells(spec, check(spec)) for run in cell.trials)
    return tried and all(score.values and not score.missing for score in gather(spec).scores)


def publish(file: str, table: Table, spec: Comparison, tasks: list[str]) -> None:
    """Write the tables and the plot."""
    write_table(table, spec.output)
    plot = Path(spec.output) / "quality.png"
    figure = ""
    if plot.is_file():
        harness.RESULTS.mkdir(exist_ok=True)
        name = f"compare_{file}.png"
        shutil.copyfile(plot, harness.RESULTS / name)
        figure = f"\n\n![quality against trainable parameters](results/{name})"
    head, rows = table.rows()
    rates, chosen = table.rates()
    orders = ordering(file, table, tasks)
    harness.publish(
        f"compare_{file}",
        title=TITLES[file],
        claim=f"{claim(table, tasks)} {tally(orders['rows'])}; docs/log.md says why, as far as it is known.",
        tables=[
            {"caption": table.caption + figure, "columns": head, "rows": rows},
            orders,
            {"caption": "The learning rates that were chosen.", "columns": rates, "rows": chosen},
        ],
        data=[dataclasses.asdict(score) for score in table.scores],
        settings={"file": f"recipes/compare/{file}.yaml", "tasks": ", ".join(tasks)},
        device="cpu",
        script=f"compare_methods.py {file}",
    )


def claim(table: Table, tasks: list[str]) -> str:
    """Where LoRA stands, task by task."""
    parts = []
    for task in tasks:
        scores: dict[str, Any] = {score.method: score for score in table.deciding if score.task == task}
        known = [score for score in scores.values() if score.centre is not None]
        order = sorted(known, key=lambda score: -score.centre)
        place = [score.method for score in order].index("LoRA") + 1
        parts.append(
            f"{task}: {order[0].method} {order[0]}, LoRA {scores['LoRA']} (place {place} of {len(order)}), "
            f"full fine-tuning {scores['FT']}"
        )
    return "The best method, LoRA on query and value, and full fine-tuning. " + "; ".join(parts) + "."


if __name__ == "__main__":
    main()
