"""``lorica study``: what an adapter learned; ``lorica study forget``: what that cost elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.cli.shared.parsing import Parser, add_output, add_trust
from lorica.plain import as_json

if TYPE_CHECKING:
    from lorica.adapter import Adapter


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "study",
        description="Study an adapter: spectra and effective ranks, amplification, advice. "
        "Writes a page that opens offline, its figures as PNG and SVG, and all numbers as JSON. "
        "`lorica study forget --help` is for what training cost on other data.",
    )
    add = result.add_argument
    add("adapter", type=str, help="folder with the adapter, lorica's or PEFT's; or a checkpoint of loralib's")
    add_output(result, "folder for the report", "report")
    text = "the base model, for amplification, overlap and drift: folder, file of safetensors or Hub name"
    add("--base", type=str | None, help=text)
    add("--against", type=str | None, help="another adapter: a second seed, another rank or task")
    add("--alpha", type=float | None, help="lora_alpha of a checkpoint of loralib's; it is not in the file")
    add("--energy", type=float, default=0.99, help="share of each layer's energy to keep (default: 0.99)")
    add("--budget", type=int | None, help="the most parameters that the advice may propose")
    add("--cut", type=str | None, help="folder, new or empty, for the adapter at the ranks that are advised")
    return result


def run(argv: list[str]) -> int:
    """Study, write, and print the advice."""
    if argv[:1] == ["forget"]:
        return forget(argv[1:])
    parsed: Any = parser().parse_args(argv)

    from lorica.algebra import error
    from lorica.cli.shared.made import check_new, save_and_show
    from lorica.errors import AdapterError
    from lorica.study import cut
    from lorica.study.figures import write_report
    from lorica.study.report import gather

    out = check_new(parsed.cut) if parsed.cut else None
    adapter = read(parsed.adapter, parsed.alpha)
    report = gather(
        adapter,
        name=_name(parsed.adapter),
        base=parsed.base,
        against=None if parsed.against is None else read(parsed.against, parsed.alpha),
        against_name=_name(parsed.against or ""),
        energy=parsed.energy,
        budget=parsed.budget,
        facts=facts_of(parsed.adapter),
    )
    page = write_report(report, parsed.output)
    for note in report.notes:
        print(f"note: {note}")
    if report.advice is not None:
        print(report.advice)
    print(f"wrote {page}")
    if out is not None:
        if report.advice is None:
            raise AdapterError(f"{parsed.adapter} has learned nothing, so there is nothing to cut it to")
        smaller = cut(adapter, report.advice)
        save_and_show(smaller, error(smaller, [adapter]), out, parsed.adapter, of=[parsed.adapter])
    return 0


def read(path: str, alpha: float | None) -> Adapter:
    """An adapter from its folder, or from a checkpoint of loralib's."""
    from lorica import checkpoint
    from lorica.checkpoint import loralib

    return loralib.read(path, alpha) if Path(path).is_file() else checkpoint.read(path)


def facts_of(path: str) -> dict[str, str]:
    """The recipe beside an adapter; nothing in it is run, and a damaged one counts as none."""
    from lorica.errors import FileError
    from lorica.reading import read_yaml

    try:
        recipe = read_yaml(Path(path) / "recipe.yaml", "the recipe")
    except FileError:
        return {}
    if not isinstance(recipe, dict):
        return {}
    data = recipe.get("data")
    found = {"task": recipe.get("task"), "trained on": data.get("train") if isinstance(data, dict) else None}
    return {title: text for title, text in found.items() if isinstance(text, str)}


def _name(path: str) -> str:
    return Path(path).resolve().name


def forget_parser() -> Parser:
    """The options of ``lorica study forget``."""
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


def forget(argv: list[str]) -> int:
    """Score trained models and their bases elsewhere, and show the scores."""
    parsed: Any = forget_parser().parse_args(argv)

    from lorica.errors import ConfigError
    from lorica.train.forgetting import forgetting
    from lorica.train.settings import DataConfig

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
        show_forgetting(found)
    return 0


def show_forgetting(found: list[Any]) -> None:
    """Print a row per run, and the forgetting of methods that learned as much."""
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
