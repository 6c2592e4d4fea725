"""Which reader takes a file."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from lorica.errors import FileError
from lorica.train.data.delimited import read_delimited
from lorica.train.data.excel import read_sheets
from lorica.train.data.json import read_objects
from lorica.train.data.tables import Form, Found
from lorica.train.data.text import PACKED, content, decoded, read_conll, read_lines_of_text

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
    ".conll": "conll",
    ".conllu": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
    ".parquet": "parquet",
    ".arrow": "arrow",
}

_TABLES = ("parquet", "arrow")


def format_of(path: Path) -> str | None:
    """Format of a file of rows by its name, or None."""
    packed = path.suffix.lower() in PACKED
    kind = FORMATS.get(Path(path.name[: -len(path.suffix)] if packed else path.name).suffix.lower())
    return None if packed and kind in _TABLES else kind


def read_file(path: Path, form: Form) -> dict[str | None, Found]:
    """Rows of a file, by split or sheet; under None where it has neither.

    Args:
        path: the file.
        form: what is known of how it is written.

    Raises:
        FileError: its format cannot be told by its name, or it cannot be read as that.
    """
    kind = format_of(path)
    if kind is None:
        raise FileError(f"cannot tell the format of {path} by its name; {_expected(path)}")
    if kind in _TABLES:
        return {None: Found(_stored(path, kind))}
    raw = content(path, kind)
    if not raw.strip():
        raise FileError(f"{path} has no rows")
    collects = gc.isenabled()
    gc.disable()  # or the collector walks over all the cells again and again, for half of the time
    try:
        return read_sheets(raw, path, form) if kind == "xlsx" else _read_text(raw, path, kind, form)
    finally:
        if collects:
            gc.enable()


def _read_text(raw: bytes, path: Path, kind: str, form: Form) -> dict[str | None, Found]:
    text, notes = decoded(raw, path, form.encoding)
    if kind in ("csv", "tsv"):
        found = {None: read_delimited(text, path, kind, form)}
    elif kind == "json":
        found = read_objects(text, path)
    elif kind == "conll" or form.tagged:
        found = {None: read_conll(text, path)}
    else:
        found = {None: read_lines_of_text(text, path)}
    return {
        name: Found(each.rows, each.lines, (*notes, *each.notes), each.broken) for name, each in found.items()
    }


def _stored(path: Path, kind: str) -> Dataset:
    try:
        rows: Any = datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # each reader raises its own kinds, wrapped in datasets' own
        if "corresponds to no data" in str(error):
            raise FileError(f"{path} has no rows") from error
        raise FileError(f"cannot read {path} as {kind}: {reason(error)}") from error
    assert isinstance(rows, Dataset)
    return rows


def reason(error: BaseException) -> str:
    """The first line of what an error, or the one that it came of, says."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no detail'}"


def _expected(path: Path) -> str:
    if path.suffix.lower() in (".xls", ".ods", ".numbers"):
        return "save it as .xlsx or .csv"
    return f"expected one of {', '.join(FORMATS)}; of those that are text, also packed: {', '.join(PACKED)}"
