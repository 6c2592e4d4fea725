"""Train by each recipe on small data, and write docs/recipes.md from what came out.

    make recipes                                   every run of runs.yaml; under half an hour on one core
    python recipes/small/run.py --only sst2 rte    these, whether they stand there or not
    python recipes/small/run.py --steps 1          a trial of all, of which nothing is noted

The data are looked for in ../shared/data, or in $LORICA_DATA. What a run came to is noted as it ends in
runs/recipes/results.json, and a run that stands there with the same command is not made again: remove that
file to begin anew. The page is written once all are there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import own_rows
import small_models
import yaml

from lorica.cli import main as lorica
from lorica.train import Record
from lorica.train.console import duration, scores
from lorica.train.system import write_atomically

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "recipes.md"
WORK = Path("runs") / "recipes"
RESULTS = WORK / "results.json"
SHOWN_DATA = Path("../shared/data")

INTRODUCTION = """\
# Recipes that were run

Written by `make recipes`; do not edit. Each row is the command below it, on one core of a CPU. The rows are
few and so are the steps, and the models that write or see are tiny, some with random weights: a score shows
that the task runs from end to end on real rows, not what the recipe reaches. Minutes are those of the
processor, for the whole command. Runs of post-training were made once more by TRL and PEFT, from the same
start, rows and seed.

| run | task | model | rows learned | scored on | steps | min | scores |
|---|---|---|---:|---:|---:|---:|---|
"""


@dataclass(frozen=True)
class Run:
    """A recipe on a data set.

    Args:
        about: what is learned, in a line.
        model: see `small_models.make`.
        options: options of ``lorica train``.
        scores: those to show.
        recipe: name of the recipe that the options change, or None for none.
        needs: folders of the data sets that must be there.
        beside_peft: train it once more with TRL and PEFT, and say how the two differ.
    """

    about: str
    model: str
    options: Mapping[str, Any]
    scores: list[str]
    recipe: str | None
    needs: list[str] = field(default_factory=list)
    beside_peft: bool = False

    def command(self, name: str, model: str) -> list[str]:
        """The command; its places, such as that of the data, are names in braces."""
        options = {**self.options, "model": model, "training.report_to": "[]", "output": "{runs}/" + name}
        recipe = [] if self.recipe is None else [f"recipes/{self.recipe}.yaml"]
        given = (part for key, value in options.items() for part in (f"--{key}", str(value)))
        return ["lorica", "train", *recipe, *given]


def runs() -> dict[str, Run]:
    """All runs, in the page's order."""
    found = yaml.safe_load((HERE / "runs.yaml").read_text(encoding="utf-8"))
    return {name: Run(**{"recipe": name, **values}) for name, values in found.items()}


def main() -> int:
    """Run what is missing or asked for, and write the page."""
    known = runs()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=known, help="names of runs (default: those that are not noted yet)"
    )
    parser.add_argument("--steps", type=int, help="steps of each run, as a trial of which nothing is noted")
    chosen = parser.parse_args()
    trial = chosen.steps is not None

    data = Path(os.environ.get("LORICA_DATA") or ROOT.parent / "shared" / "data").resolve()
    work = WORK / "trial" if trial else WORK
    own = {"rows": work / "rows", "runs": work}
    commands = {
        name: run.command(name, small_models.place(run.model, work / "models")) for name, run in known.items()
    }
    shown = {name: shlex.join(filled(command, data=SHOWN_DATA, **own)) for name, command in commands.items()}

    def due() -> list[str]:
        noted = results()
        return [name for name in known if noted.get(name, {}).get("command") != shown[name]]

    own_rows.write(own["rows"])
    for name in chosen.only or (list(known) if trial else due()):
        run = known[name]
        if absent := [each for each in run.needs if not (data / each).is_dir()]:
            print(f"== {name}: left out, there is no {data / absent[0]}", flush=True)
            continue
        print(f"== {name}: {shown[name]}", flush=True)
        began = time.process_time()
        model = small_models.make(run.model, work / "models")
        steps = ["--training.max_steps", str(chosen.steps)] if trial else []
        if code := lorica([*filled(commands[name], data=data, **own)[1:], *steps, "--overwrite"]):
            return code
        if not trial:
            facts = {
                "model": model,
                "command": shown[name],
                "minutes": duration(time.process_time() - began),
                **outcome(Record.load(work / name, trust_task=True), run.scores),
            }
            if run.beside_peft:
                from beside_peft import beside

                facts["beside"] = str(beside(work / name))
            write_atomically(RESULTS, json.dumps({**results(), name: facts}, indent=1) + "\n")
    if not trial:
        if not due():
            write_atomically(PAGE, page(known, results()))
        print(f"not run yet: {', '.join(due())}" if due() else f"wrote {PAGE}")
    return 0


def results() -> dict[str, Any]:
    """What the runs came to that ended so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def filled(command: Sequence[str], **places: Path) -> list[str]:
    """A command whose places have no names in braces any more."""
    return [part.format(**places) if "{" in part else part for part in command]


def outcome(record: Record, wanted: list[str]) -> dict[str, Any]:
    """What the page says of a run."""
    metrics, rows = record.results["metrics"], record.results["rows"]
    split = "test" if "test" in metrics else "validation"
    shown = dict(scores(metrics[split]))
    return {
        "task": record.recipe.task,
        "rows": f"{rows['train']:,}",
        "scored": f"{rows[split]:,} {split}",
        "steps": f"{record.results['steps']:,}",
        # METEOR and its like are left out where there is no Java.
        "scores": ", ".join(f"{name} {shown[name]}" for name in wanted if name in shown),
    }


def page(known: Mapping[str, Run], noted: Mapping[str, Mapping[str, str]]) -> str:
    """The page, of all runs."""
    columns = ("task", "model", "rows", "scored", "steps", "minutes", "scores")
    lines = []
    for name in known:
        cells = [f"[{name}](#{name})", *(noted[name][column] for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    for name, run in known.items():
        lines += ["", f"## {name}", "", run.about, "", "```sh", broken(noted[name]["command"]), "```"]
        lines += ["", noted[name]["beside"]] if run.beside_peft else []
    return INTRODUCTION + "\n".join(lines) + "\n"


def broken(command: str, width: int = 110) -> str:
    """A command over several lines, each as full as it gets."""
    first, *options = command.split(" --")
    lines = [first]
    for option in options:
        longer = f"{lines[-1]} --{option}"
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(f"    --{option}")
    return " \\\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
