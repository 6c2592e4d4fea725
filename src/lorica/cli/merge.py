"""``lorica merge``: an adapter folded into its base."""

from __future__ import annotations

from typing import Any

from lorica.cli.parsing import Parser


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "merge",
        description="Fold an adapter into its base, in float32, rounded once to the base's dtype, and "
        "write a plain checkpoint "
        "that needs neither lorica nor PEFT.",
    )
    result.add_argument("base", type=str, help="the base model: a folder or a Hub name")
    result.add_argument("adapter", type=str, help="folder with the adapter, lorica's or PEFT's")
    result.add_argument("out", type=str, help="folder for the merged model; it must be new or empty")
    result.add_argument(
        "--dtype",
        type=str,
        default="auto",
        help="dtype of the merged model: float32, bfloat16, float16, or auto, which keeps the base's",
    )
    return result


def run(argv: list[str]) -> int:
    """Merge, save, and say what rounding cost."""
    parsed: Any = parser().parse_args(argv)

    from lorica.train.console import make_console, size
    from lorica.train.files import bytes_of
    from lorica.train.merging import merge_checkpoint

    report, out = merge_checkpoint(parsed.base, parsed.adapter, parsed.out, dtype=parsed.dtype)
    path, worst = report.worst
    console = make_console()
    lines = str(report).splitlines()
    for line in lines[:11]:
        console.print(line)
    if len(lines) > 11:
        console.print(f"  ... and {len(lines) - 11} more layers that lost less")
    console.print(f"worst: {path}, {worst:.2e} of its update")
    console.print(f"wrote a plain checkpoint of {size(bytes_of(out))} to {out}")
    return 0
