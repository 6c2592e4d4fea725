"""``lorica compare``: methods × tasks × seeds, to one table."""

from __future__ import annotations

from typing import Any

from lorica.cli.shared.parsing import Parser, add_output, add_trust
from lorica.plain import as_json


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "compare",
        description="Run the methods, tasks and seeds that FILE.yaml names, as far as they have not run yet, "
        "and print and write the table. After a kill the same command goes on where it was.",
    )
    add = result.add_argument
    add("file", type=str, help="the comparison, such as recipes/compare/classification.yaml")
    add("--data", type=str | None, help="folder from which the file's relative paths of rows start")
    add_output(result, "folder for results, table and plot (default: the file's)")
    add("--counts", action="store_true", help="print what each method would train, and run nothing")
    add("--table", action="store_true", help="print the table of what has run so far, and run nothing")
    add("--in_process", action="store_true", help="run here, not in a process each: no peak memory then")
    add("--json", action="store_true", help="print JSON at the end instead of a table")
    add_trust(result)
    return result


def run(argv: list[str]) -> int:
    """Compare, and show the table; 1 where a run failed."""
    parsed: Any = parser().parse_args(argv)

    from lorica.compare.file import Comparison
    from lorica.train.console import make_console

    given = {name: getattr(parsed, name) for name in ("data", "output")}
    changes = {name: value for name, value in given.items() if value}
    spec = Comparison.load(parsed.file, trust_task=parsed.trust_task, **changes)
    console = make_console(stderr=parsed.json)
    if parsed.counts:
        _print_counts(console, spec, in_json=parsed.json)
        return 0

    from lorica.compare.loop import compare, gather
    from lorica.compare.report import write_table

    table = gather(spec) if parsed.table else compare(spec, console=console, in_process=parsed.in_process)
    files = write_table(table, spec.output)
    if parsed.json:
        print(files[-1].read_text(encoding="utf-8"), end="")
    else:
        _print(console, table)
        console.print(f"written: {', '.join(map(str, files))}", soft_wrap=True, markup=False)
    for line in table.failures:
        console.print(f"failed: {line}", markup=False, soft_wrap=True)
    return 1 if table.failures else 0


def _print(console: Any, table: Any) -> None:
    from lorica.train.console import print_table

    for title, (head, rows) in ((table.caption, table.rows()), ("", table.rates())):
        cells = [[_bold(cell) for cell in row] for row in rows]
        print_table(console, title, head, cells)


def _bold(cell: str) -> Any:
    from rich.text import Text

    return Text(cell[2:-2], style="bold") if cell.startswith("**") else cell


def _print_counts(console: Any, spec: Any, *, in_json: bool) -> None:
    from lorica.compare.check import counts
    from lorica.train.console import print_table, size

    found = counts(spec)
    if in_json:
        print(as_json(found))
        return
    for model in dict.fromkeys(each.model for each in found):
        rows = [
            [
                each.method,
                each.family,
                f"{each.trainable:,}",
                f"{100 * each.trainable / each.total:.3f} %",
                size(4 * each.trainable),
            ]
            for each in found
            if each.model == model
        ]
        head = ["method", "class", "trainable, head left out", "of the model", "file in float32"]
        print_table(console, model, head, rows)
