"""``lorica evaluate``: score a trained adapter."""

from __future__ import annotations

from typing import Any

from lorica.cli.shared.parsing import (
    Parser,
    add_generation,
    add_launch,
    add_trust,
    generation_of,
    launched,
    tells,
)
from lorica.plain import as_json


def parser() -> Parser:
    """The command's options."""
    result = Parser("evaluate", description="Score a trained adapter, or a model merged from one.")
    result.add_argument("directory", type=str, help="folder that `lorica train` or `lorica merge` wrote")
    result.add_argument(
        "--data.test",
        dest="test",
        type=str | None,
        help="rows to score on: a csv, tsv, json, jsonl (.gz) or parquet file, a folder or a Hub data set "
        "(default: the recipe's test rows)",
    )
    result.add_argument("--json", action="store_true", help="print JSON instead of a table")
    result.add_argument(
        "--predictions",
        type=str | None,
        help="file for the texts that a language model wrote, with their references, as JSON lines",
    )
    add_generation(result)
    add_launch(result)
    add_trust(result)
    return result


def run(argv: list[str]) -> int:
    """Score, and show the scores."""
    command = parser()
    parsed: Any = command.parse_args(argv)
    if (code := launched(command, parsed, "evaluate", argv, "start it again")) is not None:
        return code

    from lorica.train.console import make_console, print_table, scores
    from lorica.train.trained import evaluate, recipe_of

    generation = generation_of(parsed, recipe_of(parsed.directory, trust_task=parsed.trust_task).generation)
    metrics = evaluate(
        parsed.directory,
        parsed.test,
        generation=generation,
        predictions=parsed.predictions,
        trust_task=parsed.trust_task,
    )
    if not tells():
        return 0
    if parsed.json:
        print(as_json(metrics))
        return 0
    rows = int(metrics.pop("rows"))
    print_table(
        make_console(), f"{parsed.directory} on {rows:,} test rows", ["metric", "score"], scores(metrics)
    )
    return 0
