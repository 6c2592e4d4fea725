"""Plain text: one text a line."""

from __future__ import annotations

from pathlib import Path

from lorica.errors import FileError
from lorica.train.formats.found import Found
from lorica.train.formats.tables import table
from lorica.train.formats.text import lines_of


def read_lines_of_text(text: str, path: Path) -> Found:
    """A row with a ``text`` for each line that is not blank, spaces and all.

    Raises:
        FileError: there is none.
    """
    found = [(number, line) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    if not found:
        raise FileError(f"{path} has no rows")
    data, notes = table({"text": [line for _, line in found]}, path)
    return Found(data, [number for number, _ in found], ("each of its lines is a text", *notes))
