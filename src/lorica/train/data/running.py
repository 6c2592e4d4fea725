"""Running texts, such as books: rows of paragraphs, each of which continues from the one before.

Call me Ishmael.      continues: False     a task that learns raw text joins them again, to the letter,
Some years ago...     continues: True      and cuts the whole into pieces that follow on
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorica.errors import FileError
from lorica.train.data.tables import Found, table
from lorica.train.data.text import lines_of

CONTINUES = "continues"
"""Column that says whether a row continues from the one before it."""

_PARAGRAPH = re.compile(r".*?\n(?:[ \t]*\n)+|.+\Z", re.DOTALL)

_FEW = 50
"""Lines a blank one: where there are more, the blank ones are accidents of a list of texts."""

_LONG = 100
"""Letters a line, in the mean, of paragraphs that are one line each; texts of a list are shorter."""


def is_running(text: str) -> bool:
    """Whether a text runs on, and is not a text a line.

    It has blank lines between paragraphs, and some of these are of several lines, or lines are long.
    """
    lines = lines_of(text.strip())
    filled = [bool(line.strip()) for line in lines]
    breaks = sum(before and not line for before, line in itertools.pairwise(filled))
    if not breaks or sum(filled) > _FEW * breaks:
        return False
    wrapped = any(before and line for before, line in itertools.pairwise(filled))
    return wrapped or sum(map(len, lines)) > _LONG * sum(filled)


def paragraphs(text: str) -> list[str]:
    """A text cut behind its blank lines; joined, the parts are the text, with line breaks as one sign."""
    return _PARAGRAPH.findall(text.replace("\r\n", "\n").replace("\r", "\n"))


def running_columns(texts: Sequence[Sequence[str]]) -> dict[str, list[Any]]:
    """The columns of some texts' paragraphs."""
    return {
        "text": [paragraph for parts in texts for paragraph in parts],
        CONTINUES: [place > 0 for parts in texts for place in range(len(parts))],
    }


def read_running_text(text: str, path: Path) -> Found:
    """A row for each paragraph: its ``text``, blank lines behind it included, and whether it ``continues``.

    Raises:
        FileError: there is nothing to read.
    """
    if not text.strip():
        raise FileError(f"{path} has no rows")
    parts = paragraphs(text)
    data, notes = table(running_columns([parts]), path)
    lines, at = [], 1
    for part in parts:
        lines.append(at)
        at += part.count("\n")
    told = f"it is one running text of {len(parts):,} paragraphs (--data.running false: a text a line)"
    return Found(data, lines, (told, *notes))
