"""What a reader is told of a file, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from datasets import Dataset


@dataclass(frozen=True)
class Form:
    """What is known of how a file is written, besides its name.

    Args:
        encoding: encoding of a text file. None takes that of its byte-order mark, else UTF-8, else cp1252.
        columns: names of the columns of a file that does not begin with them. None takes its first line.
        tagged: whether a ``.txt`` file holds a word and its class a line, and not a text.
    """

    encoding: str | None = None
    columns: Sequence[str] | None = None
    tagged: bool = False


@dataclass(frozen=True)
class Found:
    """Rows as a file holds them.

    Args:
        rows: the rows.
        lines: line of the file, from 1, on which each row begins. None where there are no lines.
        notes: what a user should know of how the file was read; each a whole line that names no file.
        broken: row → why it cannot be used.
    """

    rows: Dataset
    lines: Sequence[int] | None = None
    notes: tuple[str, ...] = ()
    broken: Mapping[int, str] = field(default_factory=dict)
