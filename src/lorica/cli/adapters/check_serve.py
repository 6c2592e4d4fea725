"""``lorica check-serve``: the parts of an adapter that another server would refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorica.cli.shared.parsing import Parser
from lorica.plain import as_json


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "check-serve",
        description="List what a server would refuse of an adapter, or compute otherwise than it was "
        "trained, and the remedy. Only the files are looked at. Exits with 1 where something is refused.",
    )
    result.add_argument("adapter", type=str, help="folder with the adapter, lorica's or PEFT's")
    result.add_argument("--for", dest="server", type=str | None, help="vllm, sglang or llamacpp (required)")
    result.add_argument(
        "--max_rank", type=int, default=16, help="largest rank that the server allows (vLLM: --max-lora-rank)"
    )
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def run(argv: list[str]) -> int:
    """Check, and print the findings."""
    command = parser()
    parsed: Any = command.parse_args(argv)
    if parsed.server is None:
        command.error("name the server with --for: vllm, sglang or llamacpp")

    from lorica.export import check_serve

    found = check_serve(parsed.adapter, parsed.server, max_rank=parsed.max_rank)
    if parsed.json:
        print(as_json([dataclasses.asdict(finding) for finding in found]))
    else:
        print("\n".join(map(str, found)) or f"{parsed.server} serves {parsed.adapter} as it was trained")
    return int(any(finding.refused for finding in found))
