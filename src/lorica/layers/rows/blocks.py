"""The factors of mixed adapters, side by side in memory, so that choosing some of them is an index.

    block (adapters, r, d_in)    ┌ A of "topics" ┐
                                 ├ A of "tone"   ┤    each parameter's memory is a row of the block
                                 └ A of "long"   ┘

The first mixture that names an adapter moves its factors into a block of their shape, and there they stay.
Whoever trains a parameter or writes to it writes to the block. So nothing is held twice, nothing is out of
date, and the next mixture, of whichever rows, looks up where they are.

A factor is left alone if it is not on a CPU, or if something else refers to its memory: a value that
`lorica.extract` gave, one buffer of many parameters, another process.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

_LOCK = threading.Lock()
_WEIGHT = itemgetter("weight")
_NONE: dict[str, Any] = {"weight": torch.empty(0)}
_LEAST = 4  # rows of the first block: room that nobody has written to costs no memory


class Block:
    """Room for the factors of some adapters of one rank.

    Args:
        A: (rows, r, d_in).
        B: (rows, d_out, r).
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = A, B
        # Row after row, of A and of B each: the table that the parameter is in, itself, and where its memory
        # begins. In lists, for a mixture looks at all of them.
        self._tables: list[Any] = [_NONE] * (2 * len(A))
        self._parameters: list[Any] = [_NONE["weight"]] * (2 * len(A))
        self._starts = [_NONE["weight"].data_ptr()] * (2 * len(A))
        self._users: list[tuple[weakref.ref[Any], ...]] = [()] * len(A)
        self._readers: weakref.WeakSet[Any] = weakref.WeakSet()

    def room(self, A: Tensor, B: Tensor) -> int | None:
        """A row for these that nothing refers to, and no mixture may still read; None if there is none."""
        if (self.A.shape[1:], self.B.shape[1:], self.A.dtype) != (A.shape, B.shape, A.dtype):
            return None
        read = len(self._readers) > 0
        rows = range(len(self.A))
        return next((i for i in rows if not self._users[i] or (not read and self._idle(i))), None)

    @property
    def empty(self) -> bool:
        """Whether nothing refers to any row."""
        return all(map(self._idle, range(len(self.A))))

    def _idle(self, row: int) -> bool:
        return all(user() is None for user in self._users[row])

    def put(self, row: int, tables: Sequence[dict[str, Any]]) -> None:
        """Move the factors in two tables of parameters into a row."""
        parameters = [table["weight"] for table in tables]
        moved = [_row(own, row, p) for own, p in zip((self.A, self.B), parameters, strict=True)]
        for parameter, (memory, _) in zip(parameters, moved, strict=True):
            parameter.data = memory
        self._users[row] = tuple(user for _, user in moved)
        both = slice(2 * row, 2 * row + 2)
        self._tables[both], self._parameters[both] = tables, parameters
        self._starts[both] = [parameter.data_ptr() for parameter in parameters]

    def drop(self, row: int) -> None:
        """The adapter in a row is gone."""
        both = slice(2 * row, 2 * row + 2)
        self._tables[both], self._parameters[both] = [_NONE] * 2, [_NONE["weight"]] * 2
        self._starts[both] = [_NONE["weight"].data_ptr()] * 2

    def holds(self, first: int, last: int) -> bool:
        """Whether the parameters of these rows are still the same, and where they were put."""
        rows = slice(2 * first, 2 * last + 2)
        parameters = self._parameters[rows]
        return (
            all(map(is_, map(_WEIGHT, self._tables[rows]), parameters))
            and list(map(Tensor.data_ptr, parameters)) == self._starts[rows]
        )

    def read_by(self, reader: Any) -> None:
        """Note who reads this memory, while it lives."""
        self._readers.add(reader)

    def take(self, rows: Sequence[int], reader: Any, gaps: float) -> tuple[Sequence[int], Tensor, Tensor]:
        """A and B of ascending rows, and which these are; `reader` reads them while it lives.

        Where they are a view, rows between may be among them: at most `gaps` times as many as were asked for.
        """
        self.read_by(reader)
        span = range(rows[0], rows[-1] + 1)
        if len(span) <= (1 + gaps) * len(rows):
            return span, self.A[span.start : span.stop], self.B[span.start : span.stop]
        index = torch.tensor(rows)
        return rows, self.A.index_select(0, index), self.B.index_select(0, index)


class _Taken(NamedTuple):
    """The tensors of the last mixture, for the next one of the same adapters; all are views of blocks."""

    names: Sequence[str]
    gaps: float
    changes: int
    stacks: list[tuple[list[str | None], Tensor, Tensor]]
    spans: list[tuple[Block, int, int]]

    def holds(self) -> bool:
        return all(block.holds(first, last) for block, first, last in self.spans)


class Blocks:
    """The blocks of one layer; a copy of the layer begins without any."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[Block, int]] = {}
        self._blocks: list[Block] = []
        self._last: _Taken | None = None
        self._changes = 0

    def __reduce__(self) -> Any:
        """Copied and pickled as none: the parameters of the copy have memory of their own."""
        return Blocks, ()

    def drop(self, name: str) -> None:
        """An adapter is gone."""
        self._changes, self._last = self._changes + 1, None
        place = self._places.pop(name, None)
        if place is not None:
            place[0].drop(place[1])

    def take(
        self, As: Mapping[str, Any], Bs: Mapping[str, Any], names: Sequence[str], mixture: Any, gaps: float
    ) -> list[tuple[list[str | None], Tensor, Tensor]] | None:
        """The factors of some adapters, stacked.

        Args:
            As: adapter → the module whose `weight` is its A, for all adapters of the layer.
            Bs: likewise.
            names: which.
            mixture: what asks. Its list `kept` gets the memory that factors were moved from, for another
                thread may be reading that.
            gaps: how many times as many others may lie between, if that spares a copy.

        Returns:
            For each block: names, or None for another's factors, A (adapters, r, d_in) and B (adapters,
            d_out, r). None if a factor cannot be moved to a block.
        """
        last, changes = self._last, self._changes
        same = last is not None and (last.names, last.gaps, last.changes) == (names, gaps, changes)
        if last is not None and same and last.holds():
            for block, *_ in last.spans:
                block.read_by(mixture)
            return last.stacks
        found = self._look_up(names)
        if isinstance(found, list):
            with _LOCK:
                if not self._move(As, Bs, found, mixture.kept):
                    return None
            changes = self._changes
            found = self._look_up(names)
            if isinstance(found, list):
                return None
        taken: list[tuple[list[str | None], Tensor, Tensor]] = []
        spans = []
        for block, rows in found.items():
            span, A, B = block.take(sorted(rows), mixture, gaps)
            taken.append(([rows.get(row) for row in span], A, B))
            if isinstance(span, range):
                spans.append((block, span.start, span.stop - 1))
        # Copies would have to be made again: only where all are views is the next mixture given the same. If
        # another thread moves factors meanwhile, the count tells that these are out of date.
        self._last = _Taken(names, gaps, changes, taken, spans) if len(spans) == len(taken) else None
        return taken

    def _look_up(self, names: Sequence[str]) -> dict[Block, dict[int, str]] | list[str]:
        """By block, rows and their adapters; or the adapters whose factors are not in one, or no longer."""
        found: dict[Block, dict[int, str]] = {}
        lost = []
        for name in names:
            place = self._places.get(name)
            if place is None:
                lost.append(name)
            else:
                found.setdefault(place[0], {})[place[1]] = name
        for block, rows in found.items():
            first, last = min(rows), max(rows)
            together = last - first < 2 * len(rows) and block.holds(first, last)
            lost += () if together else (name for row, name in rows.items() if not block.holds(row, row))
        return lost or found

    def _move(
        self, As: Mapping[str, Any], Bs: Mapping[str, Any], names: list[str], before: list[Tensor]
    ) -> bool:
        """Move factors into blocks; False, and nothing is changed, if one of them cannot be."""
        tables = {name: (As[name]._parameters, Bs[name]._parameters) for name in names}
        factors = {name: (a.get("weight"), b.get("weight")) for name, (a, b) in tables.items()}
        if not all(_movable(A) and _movable(B) and A.dtype == B.dtype for A, B in factors.values()):
            return False
        for name in names:
            self.drop(name)
        self._blocks = [block for block in self._blocks if not block.empty]
        # Memory made in inference mode could not be trained afterwards.
        with torch.inference_mode(False), torch.no_grad():
            for name, (A, B) in factors.items():
                found = ((block, block.room(A, B)) for block in self._blocks)
                block, row = next(((block, row) for block, row in found if row is not None), (None, 0))
                if block is None:
                    rows = max(_LEAST, len(names), len(self._places))
                    block = Block(A.new_empty(rows, *A.shape), B.new_empty(rows, *B.shape))
                    self._blocks.append(block)
                before += (A.data, B.data)
                block.put(row, tables[name])
                self._places[name] = block, row
        return True


def _movable(factor: Any) -> bool:
    """Whether a parameter's memory is its own alone, so that nobody sees it move."""
    if type(factor) is not Parameter or factor.device.type != "cpu" or not factor.is_contiguous():
        return False
    if factor.is_inference() or not factor.numel():
        return False
    memory = factor.untyped_storage()
    alone = memory.nbytes() == factor.nbytes and not memory.is_shared()
    return alone and _references(memory) <= 2  # the parameter's, and `memory`


def _references(memory: torch.UntypedStorage) -> int:
    """The number of tensors and others that refer to this memory; many where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return 1_000 if count is None else count(memory._cdata)


def _row(block: Tensor, row: int, value: Tensor) -> tuple[Tensor, weakref.ref[Any]]:
    """A row of a block, filled, as memory of its own; and what tells whether something refers to that.

    So what is saved, sent or pickled of it is that row alone.
    """
    one = block[row].copy_(value)
    memory = (ctypes.c_byte * one.nbytes).from_address(one.data_ptr())
    memory.block = block  # type: ignore[attr-defined]  # which therefore lives as long
    return torch.frombuffer(memory, dtype=one.dtype).view(one.shape), weakref.ref(memory)
