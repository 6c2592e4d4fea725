"""Many rows, encoded a part at a time, side by side in several processes where that is asked for.

    rows ──▶ parts of 20,000 ──▶ each encoded, then kept as Arrow ──▶ put together in their order

Tokens are Python's lists only while their part is encoded. Parts are the same in however many processes, and
so is what comes of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable

from lorica.errors import ConfigError
from lorica.train.console import quiet
from lorica.train.data.rows import RowError
from lorica.train.settings import DataConfig
from lorica.train.system import preloaded_pool
from lorica.train.tasks.base import Encoded, Task
from lorica.train.tasks.language import GROUP
from lorica.train.tasks.stored import store, stored

PART = 20_000


class HowEncoded(NamedTuple):
    """Arguments of `Task.encode` besides the rows."""

    task: Task
    data: DataConfig
    tokenizer: Any
    max_length: int
    where: str

    def of(self, rows: Dataset) -> Encoded:
        """Rows, at once."""
        return self.task.encode(rows, self.data, self.tokenizer, self.max_length, self.where)


def encode_in_parts(how: HowEncoded, rows: Dataset, size: int = PART) -> Encoded:
    """Rows, a part at a time, if there are many and the task encodes each by itself.

    Args:
        how: how they are encoded.
        rows: the rows.
        size: of a part.

    Raises:
        ConfigError: several processes are asked for, and rows depend on one another.
        RowError: rows cannot be used.
    """
    task, data, processes = how.task, how.data, how.data.processes
    apart = task.encodes_apart(rows, data)
    if processes > 1 and not apart:
        raise ConfigError(
            f"data.processes is for rows that are encoded each by itself, which {task.name} does not do with "
            "these; leave it out"
        )
    if not apart or len(rows) <= size:
        return how.of(rows)
    starts = range(0, len(rows), size)
    places = [range(at, min(at + size, len(rows))) for at in starts]
    if processes == 1:
        found = [_part(how, rows.select(part)) for part in places]
    else:
        found = _side_by_side(how, rows, places)
    parts = _usable(found, starts, how.where)
    groups = task.groups(rows, data, how.where)
    features = [_renumbered(part.features, at, groups) for at, part in zip(starts, parts, strict=True)]
    return Encoded(
        concatenate_datasets(features),
        sum(part.truncated for part in parts),
        max(part.longest for part in parts),
        rows=None if all(part.rows is None for part in parts) else sum(map(len, parts)),
        lengths=_lengths(parts),
    )


def _lengths(parts: Sequence[Encoded]) -> list[int] | None:
    lengths = [part.lengths for part in parts if part.lengths is not None]
    return [n for part in lengths for n in part] if len(lengths) == len(parts) else None


class _Bad(NamedTuple):
    """Rows of a part that cannot be used."""

    rows: Sequence[int]
    problem: str


def _part(how: HowEncoded, rows: Dataset) -> Encoded | _Bad:
    try:
        return how.of(rows)
    except RowError as error:
        return _Bad(error.rows, error.problem)


def _usable(found: Sequence[Encoded | _Bad], starts: Sequence[int], where: str) -> list[Encoded]:
    """The parts, if all of their rows can be used.

    Raises:
        RowError: with all the rows that cannot.
    """
    bad = [(at, part) for at, part in zip(starts, found, strict=True) if isinstance(part, _Bad)]
    if bad:
        raise RowError([at + row for at, part in bad for row in part.rows], where, bad[0][1].problem)
    return [part for part in found if isinstance(part, Encoded)]


def _renumbered(features: Dataset, start: int, groups: Sequence[int] | None) -> Dataset:
    """Features whose groups are numbers among all rows, in place of those of their part."""
    if GROUP not in features.column_names:
        return features
    table = features.data.table
    place = table.column_names.index(GROUP)
    own = start + table.column(place).to_numpy()
    numbers = own if groups is None else np.asarray(groups)[own]
    column = pa.array(numbers, type=table.schema.field(place).type)
    return Dataset(InMemoryTable(table.set_column(place, table.schema.field(place), column)))


def _side_by_side(how: HowEncoded, rows: Dataset, places: Sequence[range]) -> list[Encoded | _Bad]:
    """Parts that processes encode, which read the rows from disk and leave what they made there."""
    with tempfile.TemporaryDirectory(prefix="lorica-encoding-") as name, quiet():
        folder = Path(name)
        rows.save_to_disk(folder / "rows")
        with preloaded_pool(how.data.processes) as pool:
            told = list(pool.map(_encode, repeat(how), repeat(folder), places))
        return [
            bad or stored(folder / str(part.start), mapped=False)
            for part, bad in zip(places, told, strict=True)
        ]


def _encode(how: HowEncoded, folder: Path, part: range) -> _Bad | None:
    """The work of one process: encode a part, and leave it in the folder."""
    with quiet():
        found = _part(how, Dataset.load_from_disk(str(folder / "rows")).select(part))
        if isinstance(found, _Bad):
            return found
        store(found, folder / str(part.start))
    return None
