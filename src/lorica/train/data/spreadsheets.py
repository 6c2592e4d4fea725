"""Rows of cells: csv and tsv as spreadsheets, pandas and corpora write them, and Excel's workbooks.

Whether quotes are characters of the texts or wrap cells is told by the whole file:

    He said "hi"<tab>0             a quote within a cell: quotes are characters (GLUE's files)
    "He said ""hi"" to me"<tab>0   each cell with a quote is wrapped, others doubled: quotes wrap (RFC 4180)

A workbook's cell is read as the text that it shows.
"""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorica.errors import ConfigError, FileError, listing
from lorica.train.data.columns import LABELS, PAIRS, TEXTS
from lorica.train.data.tables import Form, Found, named, table
from lorica.train.data.text import lines_of

_DELIMITERS = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'"}

_LOOK = 200
"""Rows by which the delimiter is told."""

_LONG = 10
"""Lines of one cell from which on the user is told: a stray quote swallows rows."""

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?", re.IGNORECASE)

_WRAPPED = re.compile(r'"(?:[^"]|"")*"')


class Row(NamedTuple):
    """A row's cells, and the line on which it begins."""

    line: int
    cells: list[str]


def read_delimited(text: str, path: Path, kind: str, form: Form) -> Found:
    """Rows of a file of cells.

    Args:
        text: the file's text.
        path: where it came from.
        kind: ``"csv"`` or ``"tsv"``, which says the delimiter where a file's first line has several.
        form: names of the columns, where the file has none.

    Raises:
        FileError: it has no rows, a quote is not closed, or its first line names no columns.
    """
    text, given = _given_delimiter(text)
    usual = ",\t;|" if kind == "csv" else "\t,;|"
    delimiter = given or _delimiter(text, ",;\t|" if kind == "csv" else usual)
    notes: list[str] = []
    if delimiter != usual[0]:
        notes.append(f"its cells are apart at {_DELIMITERS.get(delimiter, repr(delimiter))}")
    rows = _literal(text, delimiter, notes) if delimiter == "\t" else None
    found = [row for row in (_quoted(text, delimiter, path) if rows is None else rows) if row.cells]
    if given is not None:
        found = [Row(row.line + 1, row.cells) for row in found]
    if not found:
        raise FileError(f"{path} has no rows")
    return as_table(found, path, form, notes)


def as_table(found: Sequence[Row], path: Path, form: Form, notes: Sequence[str]) -> Found:
    """Rows of cells as a table.

    Args:
        found: the rows that have any cell; the first of them names the columns unless `form` does.
        path: where they came from.
        form: names of the columns, where the rows do not begin with them.
        notes: notes on the file so far.

    Raises:
        FileError: there are no rows, or the first names no columns.
        ConfigError: two of the given names are the same.
    """
    notes = list(notes)
    first = [name.strip() for name in found[0].cells]
    names = given_names(form) or first
    if names == first:
        found = found[1:]
    elif form.columns is not None:
        check_no_header(first, path)
    full = [row for row in found if "".join(row.cells).strip()]
    if blank := len(found) - len(full):
        notes.append(f"{blank:,} rows without a filled cell are left out")
    if not full:
        raise FileError(f"{path} has no rows")
    width = len(names)
    while width and not names[width - 1] and not any(any(row.cells[width - 1 :]) for row in full):
        width -= 1  # a spreadsheet's empty columns on the right
    names = named(names[:width], path)
    broken: dict[int, str] = {}
    rows: list[list[str | None]] = []
    for place, row in enumerate(full):
        cells: list[str | None] = [*row.cells[:width]]
        if len(row.cells) != width and (len(row.cells) < width or any(row.cells[width:])):
            broken[place] = _uneven(len(row.cells), names)
            cells += [None] * (width - len(cells))
        rows.append(cells)
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    if form.columns is None:
        check_header(columns, path)
    data, more = table(columns, path)
    return Found(data, [row.line for row in full], (*notes, *more, *_long_cells(full)), broken)


def _uneven(cells: int, names: Sequence[str]) -> str:
    return (
        f"has {cells} cell{'s' * (cells != 1)}, where there are {len(names)} columns: "
        f"{listing(names, limit=6)}; "
        "a text with a delimiter or a line break in it is written in quotes"
    )


def _given_delimiter(text: str) -> tuple[str, str | None]:
    """The text without a first line such as ``sep=;``, as Excel reads and writes it, and that delimiter."""
    found = re.match(r"sep=(.)(\r\n|\n|\r)", text, re.IGNORECASE)
    return (text[found.end() :], found[1]) if found else (text, None)


def _delimiter(text: str, usual: str) -> str:
    """The delimiter of the first line; of several, the one that gives all rows as many cells."""
    first = next((line for line in lines_of(text[:100_000]) if line.strip()), "")
    bare = re.sub(_WRAPPED, "", first)
    there = [mark for mark in usual if mark in bare]
    if len(there) < 2:
        return there[0] if there else usual[0]
    return next((mark for mark in there if _even(text, mark)), max(there, key=bare.count))


def _even(text: str, delimiter: str) -> bool:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    widths: set[int] = set()
    try:
        for _, row in zip(range(_LOOK), rows, strict=False):
            widths.add(len(row))
    except csv.Error:
        return False
    return len(widths - {0}) == 1


def _quoted(text: str, delimiter: str, path: Path) -> list[Row]:
    """Rows in which quotes wrap cells (RFC 4180)."""
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found: list[Row] = []
    line = 1
    try:
        for cells in reader:
            found.append(Row(line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise FileError(
            f"cannot read {path} as csv: the row that begins in line {line} has a quote that does not "
            "wrap a whole "
            f"cell ({error}). A quote within a cell is written twice, and the cell wrapped in quotes"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return found


def _literal(text: str, delimiter: str, notes: list[str]) -> list[Row] | None:
    """Rows in which quotes are characters, or None where they wrap cells."""
    rows = [
        Row(line, cells.split(delimiter)) for line, cells in enumerate(lines_of(text), 1) if cells.strip()
    ]
    if '"' not in text:
        return rows
    quoted = [cell for cell in _cells(rows) if '"' in cell]
    even = len({len(row.cells) for row in rows}) == 1
    sound = all(_WRAPPED.fullmatch(cell) for cell in quoted)
    if sound and even:
        # Writers wrap the cells that need it, or all of them; texts in quotes of their own are neither.
        needed = any('""' in cell[1:-1] for cell in quoted)
        all_ = all('"' in cell or not cell or _NUMBER.fullmatch(cell) for cell in _cells(rows))
        if needed or all_:
            return None
    elif not even and _wraps(text, delimiter):
        return None
    notes.append("its quotes are read as characters of the texts")
    return rows


def _wraps(text: str, delimiter: str) -> bool:
    """Whether a file whose lines have unlike numbers of cells has even rows once its quotes wrap cells."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    finally:
        csv.field_size_limit(limit)
    return len({len(row) for row in rows if row}) == 1


def _cells(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield from row.cells


def _long_cells(rows: Sequence[Row]) -> tuple[str, ...]:
    """Notes on rows that have a cell of many lines."""
    # A row with such a cell has as many lines to the next.
    wide = [row for row, after in itertools.pairwise(rows) if after.line - row.line > _LONG] + [*rows[-1:]]
    lines = [(max(cell.count("\n") for cell in row.cells), row.line) for row in wide]
    far = [each for each in lines if each[0] > _LONG]
    if not far:
        return ()
    breaks, line = max(far)
    return (
        f"{len(far):,} rows have a cell of more than {_LONG} lines, the longest of {breaks + 1:,} from "
        f"line {line}: "
        "if that is no long text, a quote there is not closed",
    )


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


def read_sheets(raw: bytes, path: Path, form: Form) -> dict[str | None, Found]:
    """Rows of a workbook's sheets, by their names; under None where only one has any.

    Raises:
        FileError: it cannot be read, openpyxl is not installed, or no sheet has rows.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise FileError(
            f"{path} needs openpyxl, which is not installed: pip install 'lorica[excel]'. Or save it as csv"
        ) from error
    try:
        book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
        rows = {sheet.title: _rows(sheet) for sheet in book.worksheets}
    except Exception as error:  # zipfile's, the XML parser's and openpyxl's own kinds
        raise FileError(f"cannot read {path} as xlsx: {type(error).__name__}: {error}") from error
    filled = {title: found for title, found in rows.items() if len(found) > 1 or (found and form.columns)}
    if not filled:
        raise FileError(f"{path} has no rows")
    alone = len(filled) == 1
    return {
        None if alone else title: as_table(
            found, path, form, notes=[f"its sheet {title!r} is read"] * (len(rows) > 1)
        )
        for title, found in filled.items()
    }


def _rows(sheet: Any) -> list[Row]:
    found = [
        Row(number, [_shown(cell) for cell in cells]) for number, cells in enumerate(sheet.iter_rows(), 1)
    ]
    width = max((place + 1 for row in found for place, cell in enumerate(row.cells) if cell), default=0)
    return [Row(row.line, row.cells[:width]) for row in found if any(row.cells)]


def _shown(cell: Any) -> str:
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, (int, float)):
        return _number(value, str(cell.number_format))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return value.isoformat(" ") if isinstance(value, datetime.datetime) else str(value)


def _number(value: float, shown_as: str) -> str:
    if isinstance(value, int) or value.is_integer():
        whole = str(int(value))
        if re.fullmatch("0+", shown_as):
            return whole.zfill(len(shown_as))
        value = int(value)
    if decimals := re.fullmatch(r"[#,]*0\.(0+)", shown_as):
        return f"{value:.{len(decimals[1])}f}"
    return str(value)
