"""Rows that can be used, and rows that cannot: their origin, their faults, their fingerprint."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
from datasets import Dataset, Image

from lorica.errors import FileError

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """The origin of some rows.

    Args:
        source: its name in messages: a file's path, or ``the test split of user/name``.
        places: place in it of each row, from 0; None where the rows are all of it, in their order.
        lines: line of the file, from 1, on which each of its rows begins; None where there are no lines.
        notes: notes for the user on how it was read; lines that do not name it.
        folder: that of the file they are in; paths in the rows are relative to it. None where there is none.
    """

    source: str
    places: Sequence[int] | None = None
    lines: Sequence[int] | None = None
    notes: tuple[str, ...] = ()
    folder: Path | None = None

    def number(self, row: int) -> int:
        """Number in the source, from 1, of a row, from 0."""
        return self._place(row) + 1

    def line(self, row: int) -> int | None:
        """Line of the source, from 1, of a row, from 0; None where there are no lines."""
        return None if self.lines is None else self.lines[self._place(row)]

    def _place(self, row: int) -> int:
        return row if self.places is None else self.places[row]

    def select(self, kept: Sequence[int]) -> Origin:
        """The origin of some of the rows."""
        places = kept if self.places is None else [self.places[row] for row in kept]
        return dataclasses.replace(self, places=list(places))


class RowError(FileError):
    """Rows that cannot be used.

    Args:
        rows: their places among the rows that were looked at, from 0.
        where: name of these rows, such as "the training rows".
        problem: fault of the first of them, such as "has no label in column 'label'".
        origin: where the rows came from, if that is known: the message then tells the first one's number, and
            its line, there.
    """

    def __init__(self, rows: Sequence[int], where: str, problem: str, origin: Origin | None = None) -> None:
        """Name the row, and the number of others."""
        self.rows, self.where, self.problem = tuple(rows), where, problem
        number, line = (
            (rows[0] + 1, None) if origin is None else (origin.number(rows[0]), origin.line(rows[0]))
        )
        at = "" if line is None else f" (line {line:,})"
        more = f" (and so have {len(rows) - 1:,} more)" if len(rows) > 1 else ""
        super().__init__(f"row {number} of {where} {problem}{at}{more}")

    def found_in(self, origin: Origin) -> RowError:
        """The same error, with the file's name and the row's number in it."""
        return RowError(self.rows, origin.source, self.problem, origin)


class Unusable(ValueError):
    """The fault of a value, such as "has no label in column 'label'"; `read_each` adds the row."""


@contextlib.contextmanager
def of_column(name: str) -> Iterator[None]:
    """Name the column in what is wrong with a value of it.

    Raises:
        Unusable: the block did.
    """
    try:
        yield
    except Unusable as problem:
        raise Unusable(f"{problem} (column {name!r})") from problem


def read_each(values: Iterable[Any], read: Callable[[Any], T], where: str) -> list[T]:
    """Read the values of all rows.

    Args:
        values: a value for each row.
        read: makes of it what is wanted; raises `Unusable` where that cannot be.
        where: name of the rows in errors.

    Raises:
        RowError: with all the rows whose value cannot be read.
    """
    found: list[T] = []
    bad: dict[int, str] = {}
    for row, value in enumerate(values):
        try:
            found.append(read(value))
        except Unusable as problem:
            bad[row] = str(problem)
    if bad:
        raise RowError(list(bad), where, next(iter(bad.values())))
    return found


@dataclass(frozen=True)
class UsableRows:
    """Rows in use, and a count of those left out.

    Args:
        rows: the rows.
        origin: where they came from.
        skipped: number of rows that could not be used.
        first: fault of the first of these, if any.
    """

    rows: Dataset
    origin: Origin
    skipped: int = 0
    first: str | None = None

    def select(self, kept: Sequence[int]) -> UsableRows:
        """Some of the rows."""
        return dataclasses.replace(self, rows=self.rows.select(kept), origin=self.origin.select(kept))


def act_on_rows(used: UsableRows, act: Callable[[Dataset], T], *, skip: bool) -> tuple[T, UsableRows]:
    """Do something with rows; leave out those with which it fails, if that is wanted.

    Args:
        used: the rows.
        act: the action; raises `RowError` for rows with which it fails.
        skip: leave these out and try again with the others.

    Returns:
        The action's result, and the rows that were used.

    Raises:
        RowError: a row cannot be used, by its number in its source.
        FileError: no row is left.
    """
    while True:
        try:
            return act(used.rows), used
        except RowError as error:
            found = error.found_in(used.origin)
            if not skip:
                raise found from error
            bad = set(error.rows)
            kept = [row for row in range(len(used.rows)) if row not in bad]
            if not kept:
                raise FileError(f"no row of {used.origin.source} can be used: {found}") from error
            used = dataclasses.replace(
                used.select(kept), skipped=used.skipped + len(bad), first=used.first or str(found)
            )


def parsed_cell(value: Any) -> Any:
    """A list or dictionary in a cell such as ``["a", "b"]`` or ``{'text': ['a']}``; others as they are.

    Python joins texts between which there is no comma; numpy's arrays are written so, and are left as texts.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return value
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(text)
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
        return value
    joined = any(one == two == tokenize.STRING for one, two in itertools.pairwise(kinds))
    return value if joined or not isinstance(found, (list, dict)) else found


def fingerprint(rows: Dataset) -> dict[str, Any]:
    """Number of some rows, and SHA-256 of their content.

    The same rows have the same one in any file. Images count by their bytes.
    """
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    for name in images:
        rows = rows.cast_column(name, Image(decode=False))
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=1000):  # as stored: nothing is decoded
        values: dict[str, Any] = cast(pa.Table, batch).to_pydict()
        for name in images:
            values[name] = [_content(image) for image in values[name]]
        digest.update(json.dumps(values, sort_keys=True, default=_hashable).encode())
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def fingerprint_on_disk(rows: Dataset) -> dict[str, Any]:
    """Number of some rows, and SHA-256 of their whole source as Arrow stores it, and of which these are.

    It takes a small part of the time of `fingerprint`, which turns each row into JSON.
    """
    digest = hashlib.sha256()
    chosen = rows._indices
    if chosen is not None:  # read in order, and not in places
        digest.update(chosen.column(0).to_numpy().tobytes())
        rows = Dataset(rows.data)
    for batch in rows.with_format("arrow").iter(batch_size=10_000):
        table = cast(pa.Table, batch).combine_chunks().replace_schema_metadata(None)
        for part in table.to_batches():
            digest.update(part.serialize())
    return {"rows": len(rows) if chosen is None else len(chosen), "sha256": digest.hexdigest()}


def _content(image: dict[str, Any] | None) -> Any:
    if image is None or image["bytes"] is not None:
        return image and image["bytes"]
    try:
        return Path(image["path"]).read_bytes()
    except OSError:
        return image["path"]  # whoever looks at the image says so


def _hashable(item: Any) -> Any:
    if isinstance(item, bytes):
        return hashlib.sha256(item).hexdigest()
    if isinstance(item, (datetime.date, datetime.time)):
        return item.isoformat()
    return str(item)  # decimals, durations
