"""``lorica study``: what an adapter learned."""

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
        "Writes a page that opens offline, its figures as PNG and SVG, and all numbers as JSON.",
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
    return result


def run(argv: list[str]) -> int:
    """Study, write, and print the advice."""
    parsed: Any = parser().parse_args(argv)

    from lorica.study.report import gather, write_report

    report = gather(
        read(parsed.adapter, parsed.alpha),
        name=_name(parsed.adapter),
        base=parsed.base,
        against=None if parsed.against is None else read(parsed.against, parsed.alpha),
        against_name=_name(parsed.against or ""),
        energy=parsed.energy,
        budget=parsed.budget,
    )
    page = write_report(report, parsed.out)
    for note in report.notes:
        print(f"note: {note}")
    if report.advice is not None:
        print(report.advice)
    print(f"wrote {page}")
    return 0


def read(path: str, alpha: float | None) -> Adapter:
    """An adapter from its folder, or from a checkpoint of loralib's."""
    from lorica import checkpoint
    from lorica.checkpoint import loralib

    return loralib.read(path, alpha) if Path(path).is_file() else checkpoint.read(path)


def _name(path: str) -> str:
    return Path(path).resolve().name
