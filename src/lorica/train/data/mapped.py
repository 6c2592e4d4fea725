"""Rows that stay on disk: a file larger than memory, kept as Arrow and read where a batch wants it.

    rows.jsonl ──▶ datasets' cache, once ──▶ rows 7, 912, 33 of a batch, when it is their turn ──▶ encoded

Every row can be reached at once, so that rows are drawn at random from all of them, and a run goes on after a
stop where it was, as with rows in memory.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, Features, Value

from lorica.errors import FileError
from lorica.train.data.rows import Origin, RowError, UsableRows
from lorica.train.data.tables import named

SAMPLE = 1000
"""Rows that are looked at before training, of those that stay on disk."""

MOST_VALIDATION = 2000
"""Rows set aside for validation at most, of those that stay on disk: they are scored again and again."""


def mapped_rows(path: Path, kind: str, encoding: str | None, columns: Sequence[str] | None) -> Dataset:
    """The rows of a file, on disk.

    Args:
        path: the file.
        kind: its format: ``"json"`` (an object a line), ``"csv"``, ``"tsv"``, ``"text"``, ``"parquet"`` or
            ``"arrow"``.
        encoding: of a text file; None is UTF-8.
        columns: names of the columns of a csv or tsv file that does not begin with them.

    Raises:
        FileError: the format cannot be read so, or the file is not of it.
    """
    options: dict[str, Any] = {}
    if kind in ("csv", "tsv"):
        names = list(columns or _names(path, kind, encoding))
        # A cell is the text that is written, as in files that are read whole.
        options = {"features": Features({name: Value("string") for name in names}), "keep_default_na": False}
        options |= {"sep": ","} if kind == "csv" else {"sep": "\t", "quoting": csv.QUOTE_NONE}
        options |= {"column_names": names, "header": None} if columns else {}
    if kind in ("csv", "tsv", "json", "text") and encoding is not None:
        options["encoding"] = encoding
    loader = {"tsv": "csv"}.get(kind, kind)
    if loader not in ("csv", "json", "text", "parquet", "arrow"):
        raise FileError(
            f"{path} cannot stay on disk: data.streaming reads csv, tsv, jsonl, txt, parquet and arrow"
        )
    try:
        found: Any = datasets.load_dataset(loader, data_files=str(path), split="train", **options)
    except Exception as error:  # each reader raises its own kinds, wrapped in datasets' own
        raise FileError(f"cannot read {path} as {kind}, row by row: {_reason(error)}") from error
    assert isinstance(found, Dataset)
    return found


def _names(path: Path, kind: str, encoding: str | None) -> list[str]:
    """The first line of a csv or tsv file: the names of its columns.

    Raises:
        FileError: it cannot be read, or is packed.
    """
    try:
        with path.open(encoding=encoding or "utf-8-sig", newline="") as file:
            found = (
                csv.reader(file) if kind == "csv" else csv.reader(file, "excel-tab", quoting=csv.QUOTE_NONE)
            )
            names = next(found, [])
    except (OSError, ValueError, csv.Error) as error:
        raise FileError(
            f"cannot read {path} as {kind}, row by row: {_reason(error)}; a packed one is unpacked first"
        ) from error
    return named(names, path)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no detail').splitlines()[0]}"


class LazyRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows that are encoded when a batch asks for them.

    Args:
        used: the rows.
        encode: makes features of some of them, one or more of each.
        column_names: the features' names.
        skip: leave out rows of a batch that cannot be used, in place of refusing them.
    """

    def __init__(
        self,
        used: UsableRows,
        encode: Callable[[Dataset], Dataset],
        column_names: Sequence[str],
        *,
        skip: bool = False,
    ) -> None:
        """Keep where the rows are; none is read."""
        self.used, self.encode, self.column_names, self.skip = used, encode, list(column_names), skip

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.used.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The features of a row."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The features of the rows of a batch; torch's loaders ask for them at once.

        Raises:
            RowError: a row cannot be used, by its number in its source; or none of a batch can.
        """
        rows = [range(len(self))[row] for row in rows]
        while True:
            try:
                return list(self.encode(self.used.rows.select(rows)))  # type: ignore[arg-type]
            except RowError as error:
                bad = set(error.rows)
                left = [row for place, row in enumerate(rows) if place not in bad]
                if not self.skip or not left:
                    raise error.found_in(self._origin(rows)) from error
                rows = left

    def _origin(self, rows: Sequence[int]) -> Origin:
        return self.used.origin.select(rows)
