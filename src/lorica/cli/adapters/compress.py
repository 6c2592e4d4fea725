"""``lorica compress``: less rank for the same update, or nearly."""

from __future__ import annotations

from typing import Any

from lorica.cli.shared.parsing import Parser, add_output, output_of


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "compress",
        description="Bring each layer's update to a lower rank, the nearest there is, and print the error "
        "that makes. No model is loaded.",
    )
    result.add_argument("adapter", type=str, help="folder with the adapter, lorica's or PEFT's")
    add_output(result, "folder for the compressed adapter; it must be new or empty", required=True)
    result.add_argument("--rank", type=int | None, help="the most that any layer may have, at least 1")
    result.add_argument(
        "--energy",
        type=float | None,
        help="share of each update's squared Frobenius norm to keep, in (0, 1]; each layer gets the smallest "
        "rank that does, within --rank. Give this or --rank",
    )
    return result


def run(argv: list[str]) -> int:
    """Compress, save, and print the error."""
    command = parser()
    parsed: Any = command.parse_args(argv)

    from lorica.algebra import compress
    from lorica.checkpoint import read
    from lorica.cli.shared.made import check_new, save_and_show

    out = check_new(output_of(command, parsed))
    adapter, report = compress(read(parsed.adapter), rank=parsed.rank, energy=parsed.energy)
    save_and_show(
        adapter, report, out, parsed.adapter, f"; kept energy {report.energy:.2%}", of=[parsed.adapter]
    )
    return 0
