"""``lorica study``: what an adapter learned; ``lorica study forget``: what that cost elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.cli.parsing import Parser

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
    add("--out", type=str, default="report", help="folder to write (default: report)")
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
        from lorica.cli import forget

        return forget.run(argv[1:])
    parsed: Any = parser().parse_args(argv)

    from lorica.algebra import error
    from lorica.cli.updates import check_new, save_and_show
    from lorica.errors import AdapterError
    from lorica.study import cut
    from lorica.study.folder import write_report
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
    page = write_report(report, parsed.out)
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
    """What the recipe beside an adapter says of it; nothing in it is run, and a damaged one says nothing."""
    from lorica.errors import FileError
    from lorica.train.yaml_file import read_yaml

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
