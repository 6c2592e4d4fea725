"""``lorica study forget``: what training cost elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorica.cli.parsing import Parser, add_trust
from lorica.plain import as_json


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "study forget",
        usage="lorica study forget RUN [RUN ...] --data.train ROWS [--data.test ROWS] ...",
        description="Score trained models and their bases on data that they were not trained for: a language "
        "model by its loss, an encoder by whether its features still tell the classes apart (logistic "
        "regression on them). With runs of several methods, compares those that learned as much.",
    )
    add = result.add_argument
    add("runs", type=str, nargs="+", help="folders that `lorica train` wrote, all of one task")
    text = "the other data: a file, a folder, a Hub data set, or docstrings"
    add("--data.train", dest="rows", type=str | None, metavar="ROWS", help=text)
    text = "rows of them to score on (default: their test split, else a part of the rows)"
    add("--data.test", dest="test", type=str | None, metavar="ROWS", help=text)
    add(
        "--data.subset",
        dest="subset",
        type=str | None,
        help="configuration of a Hub data set that has several",
    )
    add("--data.text", dest="text", type=str | None, help="column of the texts (default: found by its name)")
    add("--data.text_pair", dest="text_pair", type=str | None, help="column of second texts")
    add(
        "--data.label",
        dest="label",
        type=str | None,
        help="column of the classes (default: found by its name)",
    )
    add("--json", action="store_true", help="print JSON instead of a table")
    add_trust(result)
    return result


def run(argv: list[str]) -> int:
    """Score, and show the scores."""
    parsed: Any = parser().parse_args(argv)

    from lorica.errors import ConfigError
    from lorica.train.forgetting import forgetting
    from lorica.train.recipe import DataConfig

    if parsed.rows is None:
        raise ConfigError("name the other data with --data.train")
    other = DataConfig(
        train=parsed.rows,
        test=parsed.test,
        subset=parsed.subset,
        text=parsed.text,
        text_pair=parsed.text_pair,
        label=parsed.label,
    )
    found = forgetting(parsed.runs, other, trust_task=parsed.trust_task)
    if parsed.json:
        print(as_json([{**dataclasses.asdict(f), "forgotten": f.forgotten} for f in found]))
    else:
        show(found)
    return 0


def show(found: list[Any]) -> None:
    """Print a row a run, and what methods forgot where they learned as much."""
    from lorica.train.console import make_console, print_table
    from lorica.train.forgetting import at_equal_score

    console = make_console()
    first = found[0]
    rows = [
        [
            f.run,
            f.method,
            f"{f.parameters:,}",
            f"{f.learned:.4f}",
            f"{f.before:.4f}",
            f"{f.after:.4f}",
            f"{f.forgotten:+.4f}",
        ]
        for f in found
    ]
    columns = ["run", "method", "trained", first.metric, "base", "trained model", "forgotten"]
    print_table(console, f"{first.other_metric} on the other data", columns, rows)
    if len({f.method for f in found}) > 1:
        parts = [f"{f.method} {f.forgotten:+.4f} ({f.run}, {f.learned:.4f})" for f in at_equal_score(found)]
        console.print(f"forgotten at about the same {first.metric}: {'; '.join(parts)}", soft_wrap=True)
