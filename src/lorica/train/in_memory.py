"""Rows that are in memory: tables of datasets, pandas, polars or arrow, or Python's own lists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset

from lorica.errors import ConfigError, listing
from lorica.train.formats.found import Found
from lorica.train.formats.headers import named
from lorica.train.formats.tables import columns_of, table

Table = Any
"""Rows of one split: a `datasets.Dataset`, a DataFrame of pandas or polars, a `pyarrow.Table`, a list of
dictionaries, or a dictionary of lists."""
Rows = Table | Mapping[str, Table]
"""Rows that are in memory: of one split, or of several by their names, as in a `datasets.DatasetDict`."""


def in_memory(rows: Rows) -> dict[str, Found]:
    """Rows by split, of rows in memory; those of one split are the ``train`` split.

    Raises:
        ConfigError: they are something else.
    """
    if not _is_columns(rows) and isinstance(rows, Mapping):
        if not rows:
            raise _refused("an empty mapping")
        return {str(split): as_found(each) for split, each in rows.items()}
    return {"train": as_found(rows)}


def as_found(rows: Table) -> Found:
    """Rows of one split.

    Raises:
        ConfigError: they are something else.
    """
    if isinstance(rows, Dataset):
        return Found(rows)
    if isinstance(rows, IterableDataset):
        raise _refused("an IterableDataset; Dataset.from_list(list(rows)) makes one that has a length")
    if isinstance(rows, pa.Table):
        return Found(Dataset(rows))
    if callable(getattr(rows, "to_dicts", None)):  # polars
        rows = rows.to_dicts()
    elif callable(getattr(rows, "to_dict", None)) and hasattr(rows, "columns"):
        return _of_pandas(rows)
    if _is_columns(rows):
        lengths = {str(name): len(values) for name, values in rows.items()}
        if len(set(lengths.values())) > 1:
            told = listing(f"{name} {length:,}" for name, length in lengths.items())
            raise ConfigError(f"the columns of the rows given in Python have unlike lengths: {told}")
        return _of_columns({str(name): list(values) for name, values in rows.items()})
    if isinstance(rows, Sequence) and not isinstance(rows, (str, bytes)) and rows:
        kinds = {type(row).__name__ for row in rows if not isinstance(row, Mapping)}
        if not kinds:
            return _of_columns(columns_of(rows))
        raise _refused(f"a {type(rows).__name__} of {listing(sorted(kinds))}")
    empty = "an empty " if isinstance(rows, (list, tuple)) else ""
    raise _refused(f"{empty}{type(rows).__name__}")


def _is_columns(rows: Any) -> bool:
    """Whether a mapping holds columns, and not splits: lists of what is no dictionary."""
    return (
        isinstance(rows, Mapping)
        and bool(rows)
        and all(
            isinstance(values, (list, tuple)) and not (values and isinstance(values[0], Mapping))
            for values in rows.values()
        )
    )


def _of_pandas(frame: Any) -> Found:
    names = named([str(name) for name in frame.columns], "the DataFrame")  # type: ignore[arg-type]
    # A Series' own list has Python's numbers; its gaps are NaN, NaT or NA in whatever type.
    columns = {
        name: [None if gap else value for value, gap in zip(frame.iloc[:, place].tolist(), gaps, strict=True)]
        for place, name in enumerate(names)
        for gaps in [_gaps(frame.iloc[:, place])]
    }
    return _of_columns(columns)


def _gaps(column: Any) -> list[bool]:
    # Of a list, isna() tells of the cell and not of what is in it.
    return column.isna().tolist()


def _of_columns(columns: Mapping[str, Sequence[Any]]) -> Found:
    plain = {name: [_python(value) for value in values] for name, values in columns.items()}
    if not plain or not len(next(iter(plain.values()))):
        raise _refused("a table without rows")
    rows, notes = table(plain)
    return Found(rows, notes=notes)


def _python(value: Any) -> Any:
    """A value as Python's own, where it is one of numpy's; NaN among texts is a gap, as pandas writes it."""
    if isinstance(value, float) and math.isnan(value):
        return None
    plain = getattr(value, "tolist", None)
    return plain() if plain is not None and type(value).__module__ == "numpy" else value


def _refused(kind: str) -> ConfigError:
    return ConfigError(
        "rows in Python must be a datasets.Dataset, a DatasetDict, a DataFrame, a list of dictionaries, a "
        "dictionary "
        f"of lists, or a mapping of splits to any of them, not {kind}"
    )
