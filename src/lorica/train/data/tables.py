"""Rows as tables: of Python's lists and dictionaries, of pandas, polars and arrow, or found by a reader.

A column has one type, and nothing is lost on the way to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset

from lorica.errors import ConfigError, FileError, listing


@dataclass(frozen=True)
class Form:
    """The form of a file, as far as it is known without opening it.

    Args:
        encoding: encoding of a text file. None takes that of its byte-order mark, else UTF-8, else cp1252.
        columns: names of the columns of a file that does not begin with them. None takes its first line.
        tagged: whether a ``.txt`` file holds a word and its class a line, and not a text.
        running: whether a ``.txt`` file is one running text, and not a text a line. None looks at it.
        streaming: whether its rows stay on disk.
    """

    encoding: str | None = None
    columns: Sequence[str] | None = None
    tagged: bool = False
    running: bool | None = False
    streaming: bool = False


@dataclass(frozen=True)
class Found:
    """Rows as a file holds them.

    Args:
        rows: the rows.
        lines: line of the file, from 1, on which each row begins. None where there are no lines.
        notes: notes for the user on how the file was read; whole lines that do not name the file.
        broken: row → why it cannot be used.
    """

    rows: Dataset
    lines: Sequence[int] | None = None
    notes: tuple[str, ...] = ()
    broken: Mapping[int, str] = field(default_factory=dict)


_LARGEST = 2**63


class Number(float):
    """A number with a point or an exponent, which knows how it was written."""

    written: str

    def __new__(cls, written: str) -> Number:
        """Read a number."""
        number = super().__new__(cls, written)
        number.written = written
        return number


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of rows, in the order in which their names first occur; None where a row lacks one."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def table(columns: Mapping[str, Sequence[Any]], path: object = "the rows") -> tuple[Dataset, tuple[str, ...]]:
    """Columns as a table.

    A column that mixes texts with numbers becomes one of texts, each number as it is written. One whose lists
    or dictionaries are of unlike forms, or stand beside texts, is kept as JSON.

    Args:
        columns: name → a value for each row.
        path: name of the rows in errors.

    Returns:
        The table, and notes on columns that were turned into another type.

    Raises:
        FileError: a text holds a character that is no letter.
    """
    notes: list[str] = []
    plain = {name: _plain(name, values, notes) for name, values in columns.items()}
    try:
        return Dataset.from_dict(plain), tuple(notes)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError, OverflowError):
        return Dataset.from_dict(plain, on_mixed_types="use_json"), tuple(notes)
    except UnicodeEncodeError as error:
        bad = next(row for row in range(_length(plain)) if _lone(tuple(each[row] for each in plain.values())))
        raise FileError(
            f"row {bad + 1} of {path} holds half of a surrogate pair, which is no letter ({error.reason})"
        ) from error


def _plain(name: str, values: Sequence[Any], notes: list[str]) -> list[Any]:
    kinds = {_kind(value) for value in values} - {None}
    huge = "whole number" in kinds and any(
        type(value) is int and not -_LARGEST <= value < _LARGEST for value in values
    )
    nested = {"list", "dictionary", "value"} & kinds
    if huge or ("text" in kinds and len(kinds) > 1 and not nested):
        others = listing(f"{kind}s" for kind in sorted(map(str, kinds - {"text"})))
        if "text" in kinds:
            notes.append(
                f"column {name!r} holds texts and {others}, which are taken as texts, as they are written"
            )
        return [value if value is None else _written(value) for value in values]
    if kinds <= {"number", "whole number"} and "number" in kinds:
        return [None if value is None else float(value) for value in values]
    return list(values)


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, int):
        return "whole number"
    if isinstance(value, float):
        return "number"
    if isinstance(value, (list, tuple)):
        return "list"
    return "dictionary" if isinstance(value, Mapping) else "value"


def _written(value: Any) -> str:
    if isinstance(value, Number):
        return value.written
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return str(int(value))
    return str(value)


def _length(columns: Mapping[str, Sequence[Any]]) -> int:
    return len(next(iter(columns.values()), ()))


def _lone(value: Any) -> bool:
    """Whether a text in a value holds half of a surrogate pair."""
    if isinstance(value, str):
        return any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, Mapping):
        return any(map(_lone, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_lone, value))


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
    """Whether a mapping holds columns, and not splits: lists whose items are no dictionaries."""
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
