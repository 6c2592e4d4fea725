"""A comparison's outcome as files: the table, its numbers, and the plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from lorica.checkpoint.atomic import Writer, replace_files
from lorica.compare.figure import drawn
from lorica.compare.table import Table
from lorica.plain import as_json
from lorica.train.record import versions


def write_table(table: Table, output: str | Path) -> list[Path]:
    """Write table.md, table.json, and the plot where matplotlib is there.

    Returns:
        The files.

    Raises:
        FileError: the folder cannot be written.
    """
    data = as_json({**asdict(table), "versions": versions()})
    writers: dict[str, Writer] = {
        **drawn(table),
        "table.md": lambda path: _text(path, table.markdown()),
        "table.json": lambda path: _text(path, data + "\n"),
    }
    replace_files(Path(output), writers)
    return [Path(output) / name for name in writers]


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
