"""CoNLL's files: a word and its classes a line, a blank line between sentences.

EU NNP B-NP B-ORG          words, parts of speech, phrases and names (2003)
rejects VBZ B-VP O

1<tab>The<tab>the<tab>DET...      CoNLL-U: ten columns, and comments that begin with #
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lorica.errors import FileError
from lorica.train.formats.found import Found
from lorica.train.formats.tables import table
from lorica.train.formats.text import lines_of

_2003 = ("tokens", "pos_tags", "chunk_tags", "ner_tags")
_UNIVERSAL = ("id", "tokens", "lemmas", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_SPAN = re.compile(r"O|[BIESLUM]-\S+")
_COMMENT = re.compile(r"#\s*(\S+\s*=|id\b|sent_id\b|text\b|newdoc|newpar)")


def read_conll(text: str, path: Path) -> Found:
    """A row for each sentence: ``tokens``, and a list for each column of classes.

    With two columns the classes are ``tags``; with four they are named as in CoNLL-2003; with ten as in
    CoNLL-U, whose ranges (``1-2``) and empty words (``1.1``) are left out. With another number the last is
    ``tags``. A first column of spans' classes beside words is taken for what it is.

    Raises:
        FileError: there are no sentences, or lines have unlike numbers of columns.
    """
    sentences: list[tuple[int, list[list[str]]]] = []
    current: list[list[str]] = []
    width, skipped = 0, 0
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            current = []
            continue
        if not current and _COMMENT.match(line):
            skipped += 1
            continue
        cells = line.split("\t") if "\t" in line else re.split(r" +", line.strip(" "))
        cells = [cell.strip(" ") for cell in cells]
        width = width or len(cells)
        if len(cells) != width or width < 2:
            raise FileError(
                f"cannot read {path} as CoNLL: line {number} has {len(cells)} columns, where "
                f"{max(width, 2)} are due, a "
                f"word and its classes: {line!r:.60}"
            )
        if width == len(_UNIVERSAL) and not cells[0].isdecimal():
            continue
        if not current:
            sentences.append((number, current))
        current.append(cells)
    if not sentences:
        raise FileError(f"{path} has no rows")
    columns = [[[cells[place] for cells in words] for _, words in sentences] for place in range(width)]
    names = _names(width)
    if width == 2 and _are_spans(columns[0]) and not _are_spans(columns[1]):
        names = names[::-1]
    data, notes = table(dict(zip(names, columns, strict=True)), path)
    told = [f"it is read as CoNLL: sentences of words, with the columns {', '.join(names)}"]
    if skipped:
        told.append(f"{skipped:,} lines of comments are left out")
    return Found(data, [number for number, _ in sentences], (*told, *notes))


def _names(width: int) -> Sequence[str]:
    if width == len(_UNIVERSAL):
        return _UNIVERSAL
    if width == len(_2003):
        return _2003
    return ("tokens", *(f"column{place}" for place in range(2, width)), "tags")


def _are_spans(column: Sequence[Sequence[str]]) -> bool:
    return all(_SPAN.fullmatch(cell) for cells in column for cell in cells)
