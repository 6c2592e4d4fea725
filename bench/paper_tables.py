"""The paper's tables 3 to 6, 8, 13 to 16 and 18 on a processor: what holds there, and what does not.

    python bench/paper_tables.py --table 6

Runs a file of recipes/compare, cut to minutes (`paper_studies`), as far as it has not run, and publishes it
beside the paper's own figures, with what the paper reads off them put to the test. Stop it and start it again
as you like: finished runs are lines of results/paper_tables.jsonl.

A difference counts from two standard errors on; these are of the seeds, pooled over the methods of a series.
What the paper finds level is level here within `LEVEL`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from compare_methods import DATA, FILES, exchange, is_whole
from paper_studies import LEARNING, Statement, Study
from paper_writing import WRITING
from small_decoder import folder

from lorica.compare import Comparison, Table, compare, gather, write_table
from lorica.compare.check import lower_is_better
from lorica.compare.table import Score
from lorica.reading import read_yaml

STUDIES = {**LEARNING, **WRITING}
"""Table → what is run."""
LEVEL = {"loss": 0.03}
"""By how much what is level may differ: of a loss, nats; of all else, `POINT`."""
POINT = 0.015
COSTS = 3
"""Columns at the end of a comparison's table, of costs: nothing was timed here."""


def main() -> None:
    """Run what is asked for, and publish it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", choices=list(STUDIES), required=True, help="of the paper")
    parser.add_argument(
        "--publish", action="store_true", help="run nothing, publish the methods that have run"
    )
    parser.add_argument("--in-process", action="store_true", help="in this process: saves starts")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # each run's own process reads it
    torch.set_num_threads(chosen.threads)
    if not DATA.is_dir():
        raise SystemExit(f"no folder {DATA}; set LORICA_DATA to the folder that holds sst2 and e2e_nlg")
    study, name = STUDIES[chosen.table], f"paper_table_{chosen.table}"
    spec = comparison(study)
    lines = harness.RESULTS / "paper_tables.jsonl"
    done = Path(spec.output) / "results.jsonl"
    exchange(lines, done)
    if not chosen.publish:
        compare(spec, in_process=chosen.in_process)
        exchange(lines, done)
    whole = finished(spec)
    if not whole.methods or (whole != spec and not chosen.publish):
        raise SystemExit("not written: not all its runs are there; --publish takes the methods that have run")
    publish(
        name, chosen.table, study, gather(whole), whole, [m for m in spec.methods if m not in whole.methods]
    )


def finished(spec: Comparison) -> Comparison:
    """The comparison of those of its methods whose runs are all there."""
    alone = {name: dataclasses.replace(spec, methods={name: entry}) for name, entry in spec.methods.items()}
    methods = {name: entry for name, entry in spec.methods.items() if is_whole(alone[name])}
    return dataclasses.replace(spec, methods=methods)


def comparison(study: Study) -> Comparison:
    """The study's file, cut."""
    path = FILES / f"{study.file}.yaml"
    content = over(read_yaml(path, "the comparison"), study.cut)
    if study.tasks:
        content["tasks"] = study.tasks
    if study.only:
        content["tasks"] = {name: content["tasks"][name] for name in study.only}
    if study.methods:
        content["methods"] = {name: content["methods"][name] for name in study.methods}
    if study.decoder:
        content["recipe"]["model"] = str(folder())
    for method, entry in content["methods"].items():
        if "few-shot" not in entry:
            keys = [key for key in (method, entry.get("series"), "*") if key in study.rates]
            entry["learning_rates"] = study.rates[keys[0]]
    return Comparison.from_dict({**content, "data": str(DATA)}, str(path))


def over(under: Any, cut: Mapping[str, Any]) -> Any:
    """Fields over others; mappings are merged."""
    result = dict(under)
    for name, value in cut.items():
        inside = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = over(result[name], value) if inside and name != "baseline" else value
    return result


def publish(
    name: str, number: str, study: Study, table: Table, spec: Comparison, left: Sequence[str] = ()
) -> None:
    """Write the table, the paper's beside it, and what holds; `left` are methods that have not run."""
    write_table(table, spec.output)
    found = [judged(table, statement, study.apart) for statement in about(study, spec)]
    unrun = f" Not run: {', '.join(left)}." if left else ""
    plot, figure = Path(spec.output) / "quality.png", ""
    if plot.is_file():
        shutil.copyfile(plot, harness.RESULTS / f"{name}.png")
        figure = f"\n\n![quality against trainable parameters](results/{name}.png)"
    head, rows = table.rows()
    shown = len(head) - COSTS
    caption = f"{table.caption.partition(' Trainable')[0]} Trainable parameters include a new head."
    tables = [{"caption": caption + figure, "columns": head[:shown], "rows": [row[:shown] for row in rows]}]
    if study.grid:
        tables.insert(0, grid(table))
    tables += [
        study.own,
        {
            "caption": "What the paper reads off its table, and whether it is so here. A difference counts "
            "from two standard errors of the seeds on; what is level there is level here within "
            f"{100 * POINT:g} points. With one seed a difference counts from "
            f"{100 * (study.apart or 2 * POINT):g} points on.",
            "columns": ["", "the paper's figures", "here", "difference ± 2 standard errors", "holds"],
            "rows": found,
        },
    ]
    harness.publish(
        name,
        title=study.title,
        claim=f"{what(spec)} {claim(found)}{unrun}",
        tables=tables,
        data=[dataclasses.asdict(score) for score in table.scores],
        settings={
            "file": f"recipes/compare/{study.file}.yaml",
            "model": model_of(spec),
            "cut to": ", ".join(flat({**study.cut, "tasks": study.tasks or study.cut.get("tasks", {})})),
            "learning rates": ", ".join(
                f"{'all' if method == '*' else method} {'/'.join(f'{rate:g}' for rate in rates)}"
                for method, rates in study.rates.items()
            ),
        },
        device="cpu",
        script=f"paper_tables.py --table {number}",
    )


def about(study: Study, spec: Comparison) -> list[Statement]:
    """The statements on methods that were run."""
    return [s for s in study.statements if {*s.first, *s.second} <= set(spec.methods)]


def model_of(spec: Comparison) -> str:
    """The model's name, without its folder."""
    name = spec.laid(next(iter(spec.tasks)), next(iter(spec.methods))).model
    return Path(name).name


def what(spec: Comparison) -> str:
    """What was run, in a sentence."""
    recipe = spec.laid(next(iter(spec.tasks)), list(spec.methods)[-1])
    of_tasks = [spec.laid(task, list(spec.methods)[-1]).data.train_rows for task in spec.tasks]
    rows = list(dict.fromkeys(of_tasks)) if spec.sizes == (None,) else list(spec.sizes)
    steps = recipe.training.max_steps
    epochs = recipe.training.epochs or 0
    passes = f"{epochs:g} pass{'es' * (epochs != 1)}" if steps is None else f"{steps} steps"
    drawn = ", ".join(f"{count:,}" for count in rows if count is not None)
    seeds = f"{len(spec.seeds)} seed{'s' * (len(spec.seeds) > 1)}"
    return f"{model_of(spec)} on {drawn} rows of {', '.join(spec.tasks)}, {passes}, {seeds}."


def flat(fields: Mapping[str, Any]) -> list[str]:
    """What is cut, a field each."""
    found = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found += flat(value)
        elif name not in ("keep", "prompt", "train", "test"):
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            found.append(f"{name} {shown}")
    return list(dict.fromkeys(found))


def grid(table: Table) -> dict[str, Any]:
    """A row a series, a column a rank."""
    cells: dict[str, dict[int, str]] = {}
    for score in table.deciding:
        series, _, rank = score.method.rpartition(" r=")
        cells.setdefault(series, {})[int(rank)] = str(score)
    every = sorted({rank for row in cells.values() for rank in row})
    return {
        "caption": f"By rank: {table.deciding[0].column}.",
        "columns": ["", *(f"r = {rank}" for rank in every)],
        "rows": [[series, *(row.get(rank, "") for rank in every)] for series, row in cells.items()],
    }


def judged(table: Table, statement: Statement, least: float | None = None) -> list[str]:
    """A row: the statement, the paper's figures, ours, their difference, and whether it holds."""
    task = statement.task or table.deciding[0].task
    metric = statement.metric or next(score.metric for score in table.deciding if score.task == task)
    column = [s for s in table.scores if (s.task, s.metric, s.size) == (task, metric, statement.size)]
    first, second = (
        [s for s in column if s.method in names] for names in (statement.first, statement.second)
    )
    one, two = centre(first), centre(second)
    error = noise(table, column, first, second)
    scale, digits = (100, 1) if all(s.is_share for s in (*first, *second)) else (1, 3)
    difference = (two - one) if lower_is_better(metric) else one - two
    tolerance = LEVEL.get(metric, POINT)
    alone = 2 * tolerance if least is None else least
    apart = abs(difference) > (alone if error is None else 2 * error)
    if statement.level:
        holds = "yes" if abs(difference) <= tolerance else "no" if apart else "not told apart"
    else:
        holds = ("yes" if difference > 0 else "no") if apart else "not told apart"
    spread = "one seed" if error is None else f"± {scale * 2 * error:.{digits}f}"
    size = "" if statement.size is None else f"n = {statement.size:,}: "
    return [
        f"{size}{statement.says}",
        statement.paper,
        f"{scale * one:.{digits}f}, {scale * two:.{digits}f}",
        f"{scale * (one - two):+.{digits}f} {spread}",
        holds,
    ]


def centre(scores: Sequence[Score]) -> float:
    """The mean of all runs of some methods; one that diverged is at nought."""
    return statistics.mean(value or 0.0 for score in scores for value in score.values)


def noise(
    table: Table, column: Sequence[Score], first: Sequence[Score], second: Sequence[Score]
) -> float | None:
    """The standard error of the difference of two groups' means; None where each method has one seed.

    The deviation of a run is pooled over the methods of the same series, or over those of none.
    """
    series = {cost.method: cost.series for cost in table.costs}
    of = {series[score.method] for score in (*first, *second)}
    variances = [
        score.deviation**2 for score in column if series[score.method] in of and score.deviation is not None
    ]
    if not variances:
        return None
    runs = [sum(len(score.values) for score in group) for group in (first, second)]
    return math.sqrt(statistics.mean(variances) * (1 / runs[0] + 1 / runs[1]))


def claim(found: Sequence[Sequence[str]]) -> str:
    """How many statements hold, and which do not."""
    by = {verdict: [row for row in found if row[4] == verdict] for verdict in ("yes", "no", "not told apart")}
    text = f"Of {len(found)} statements that the paper reads off its table {len(by['yes'])} hold here"
    for verdict, words in (("no", "do not hold"), ("not told apart", "cannot be told from the seeds' noise")):
        if by[verdict]:
            listed = "; ".join(f"{row[0]} ({row[2]})" for row in by[verdict])
            text += f", {len(by[verdict])} {words}: {listed}"
    return f"{text}."


if __name__ == "__main__":
    main()
