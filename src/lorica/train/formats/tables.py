"""Columns of Python's values as a table: one type a column, and nothing lost on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset

from lorica.errors import FileError, listing

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
        path: what to call the rows in an error.

    Returns:
        The table, and what to tell of columns that were turned into another type.

    Raises:
        FileError: a text holds what is no letter.
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
