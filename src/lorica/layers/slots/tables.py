"""The factors of mounted adapters at one layer, stacked: mounting an adapter is copying into a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.layers.slots.plan import Group


class Table:
    """A and B of the adapters of one rank bucket, for a layer that multiplies.

    Rows that hold nothing are zeros, so that an adapter without an update here adds nothing. There is room
    for as many as were mounted together so far.

    Args:
        rank: of the bucket.
        d_in: width of the layer's input.
        d_out: width of its output.
        like: a tensor with the dtype and device to compute in.
    """

    def __init__(self, rank: int, d_in: int, d_out: int, like: Tensor) -> None:
        self.rank = rank
        self.A = like.new_zeros(0, rank, d_in)
        self.B = like.new_zeros(0, rank, d_out)
        self.stale: set[int] = set()
        self._kept: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both, without what is kept for a batch."""
        return self.A.nbytes + self.B.nbytes

    def put(self, row: int, A: Tensor, B: Tensor) -> None:
        """Copy an adapter's factors into a row.

        Args:
            row: of the table; it grows if need be.
            A: (r, d_in), r at most the bucket's.
            B: (r, d_out), times the scale.
        """
        while row >= len(self.A):  # doubled, so that many mounts copy little
            more = max(1, len(self.A))
            self.A = torch.cat([self.A, self.A.new_zeros(more, *self.A.shape[1:])])
            self.B = torch.cat([self.B, self.B.new_zeros(more, *self.B.shape[1:])])
            self._kept = None
        for table, factor in ((self.A, A), (self.B, B)):
            table[row, : len(factor)].copy_(factor)
            table[row, len(factor) :].zero_()
        self._changed(row)

    def drop(self, row: int) -> None:
        """The adapter in a row is gone; what it leaves is cleared when another takes the row."""
        self.stale.add(row)

    def clear(self, row: int) -> None:
        """Make a row zeros, if an adapter left something there."""
        if row in self.stale:
            self.A[row].zero_()
            self.B[row].zero_()
            self._changed(row)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A and B of some rows, (adapters, rank, d_in) and (adapters, rank, d_out).

        Where they lie together this is a view; else a copy, kept until other rows are asked for.
        """
        if rows[-1] >= len(self.A):  # the last of them have no update here, and the table no room for them
            self.put(rows[-1], self.A[:0, 0], self.B[:0, 0])
        if rows[-1] - rows[0] + 1 == len(rows):
            return self.A[rows[0] : rows[-1] + 1], self.B[rows[0] : rows[-1] + 1]
        if self._kept is None or self._kept[0] != rows:
            index = torch.tensor(rows, device=self.A.device)
            self._kept = tuple(rows), self.A.index_select(0, index), self.B.index_select(0, index)
        return self._kept[1:]

    def _changed(self, row: int) -> None:
        self.stale.discard(row)
        if self._kept is not None and row in self._kept[0]:
            self._kept = None


def add_(y: Tensor, x: Tensor, group: Group, table: Table) -> None:
    """Add to each token's output what its adapter adds: ``scale · B·A·x``.

    Args:
        y: (tokens, d_out), written to.
        x: (tokens, d_in), of the table's dtype.
        group: whose tokens they are.
        table: the factors.
    """
    for row, start, stop in group.long:
        if row < len(table.A):
            y[start:stop].addmm_(x[start:stop] @ table.A[row].t(), table.B[row])
    short = group.short
    if short is None:
        return
    A, B = table.take(short.rows)
    if short.span is not None:
        start, stop = short.span
        segments = x[start:stop].unflatten(0, (len(short.rows), -1))
        y[start:stop].view(len(short.rows), -1, y.shape[1]).baddbmm_(_down(segments, A), B)
        return
    if short.gather is None:
        u = x @ A.flatten(0, 1).t()
        if not short.plain:
            u.masked_fill_(group.others, 0)  # not times 0: another's may be infinite
        y.addmm_(u, B.flatten(0, 1))
        return
    segments = x.index_select(0, short.gather).view(len(short.rows), -1, x.shape[1])
    delta = torch.bmm(_down(segments, A), B).flatten(0, 1)
    if len(short.keep) < len(delta):
        delta = delta.index_select(0, short.keep)
    y.index_add_(0, short.order, delta)


def _down(segments: Tensor, A: Tensor) -> Tensor:
    """``x·Aᵀ`` of each adapter's tokens (adapters, tokens, rank)."""
    # On a CPU a product is faster with the skinny matrix on the left: A, unless there is but one token.
    return torch.bmm(A, segments.mT).mT if segments.shape[1] > 1 else torch.bmm(segments, A.mT)
