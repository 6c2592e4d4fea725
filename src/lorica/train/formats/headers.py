"""Names of columns: those of a file's first line, or given where it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorica.errors import ConfigError, FileError, listing
from lorica.train.columns import LABELS, PAIRS, TEXTS
from lorica.train.formats.found import Form

_KNOWN = {*TEXTS, *LABELS, *(name for pair in PAIRS for name in pair)} | {
    *("id", "idx", "index", "prompt", "completion", "response", "instruction", "input", "output", "answer"),
    *(
        "context",
        "answers",
        "messages",
        "conversations",
        "system",
        "source",
        "summary",
        "score",
        "tokens",
        "tags",
    ),
    *("image", "file_name", "split", "date", "name"),
}


def given_names(form: Form) -> list[str]:
    """The names of columns that a configuration gives; none where it gives none.

    Raises:
        ConfigError: two are the same.
    """
    names = list(form.columns or [])
    if len(set(names)) < len(names):
        raise ConfigError(f"data.columns must name each column once, not {listing(names)}")
    return names


def named(names: Sequence[str], path: Path) -> list[str]:
    """Names of columns, with one for those that have none, such as the index that pandas writes.

    Raises:
        FileError: two are the same.
    """
    names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise FileError(f"{path} has two columns of the name {twice[0]!r}; rename one of them")
    return names


def check_header(columns: Mapping[str, Sequence[str | None]], path: Path) -> None:
    """Refuse a first line that is a row.

    It is one if a name of it stands among the values of its own column and no other name is one that
    columns usually have; or if it is one column whose name is as long as a sentence.

    Raises:
        FileError: it is.
    """
    again = {name for name, cells in columns.items() if name in {cell and cell.strip() for cell in cells}}
    names = list(columns)
    usual = {name for name in names if name.lower() in _KNOWN} - again
    if (again and not usual) or (len(names) == 1 and len(names[0].split()) > 6):
        guess = ["text", "label", *(f"column{place}" for place in range(3, len(names) + 1))][: len(names)]
        raise FileError(
            f"the first line of {path} must name the columns, and looks like a row: "
            f"{listing(map(repr, names), limit=6)}. Put their names above it, or give them: "
            f"--data.columns '[{', '.join(guess)}]'"
        )


def check_no_header(first: Sequence[str], path: Path) -> None:
    """Refuse names for a file whose first line names its columns otherwise.

    Raises:
        FileError: all its cells are names that columns usually have.
    """
    if all(cell.lower() in _KNOWN for cell in first):
        raise FileError(
            f"data.columns names the columns of {path}, whose first line does so too: "
            f"{listing(first, limit=6)}; "
            "leave out one of them"
        )
