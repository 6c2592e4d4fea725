"""The mounted adapter of each token of a packed batch, and the best order of its products.

    packed row   a a a a a a  b  –  c  b     prompts in one piece, one token of each answer
    long runs    a a a a a a                 a product of their own, on the tokens where they stand
    short ones                b     c  b     all together: masked, or stacked by adapter

Made once for a batch and shared by all layers; kept while the batch is made up the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LONG = 16
"""Tokens of one adapter on end from which two products of their own cost less than a part in a common one."""
MASKED = 32
"""Rows of all adapters' A together up to which one product with a mask costs less than stacked ones."""


class Place(NamedTuple):
    """The place of a mounted adapter's factors in every layer's tables.

    Args:
        rank: of the bucket; factors of a smaller one are filled up with zeros.
        row: in that bucket's tables.
    """

    rank: int
    row: int


Run = tuple[Place | None, int]
"""An adapter's place, or None for the base, and how many tokens on end are its."""


class Short(NamedTuple):
    """Tokens of short runs.

    Args:
        rows: of the tables, ascending; some of them may have no tokens.
        which: position in `rows`, for each token of the batch (tokens,); `len(rows)` where it is in none.
        gather: tokens, each adapter's brought to one count by repeating (adapters · count,); None where a
            mask is better.
        order: the tokens that count (n,).
        keep: where those are in `gather` (n,).
        plain: whether every token of the batch is of the one adapter, so that no mask is needed.
        span: where the tokens begin and end that count, if they lie together in the order of `rows` and each
            adapter has as many: then they are multiplied where they are. None elsewhere.
    """

    rows: tuple[int, ...]
    which: Tensor
    gather: Tensor | None
    order: Tensor
    keep: Tensor
    plain: bool
    span: tuple[int, int] | None


class Long(NamedTuple):
    """A run of tokens: `row` of the tables, and where it begins and ends."""

    row: int
    start: int
    stop: int


class Group:
    """The tokens of adapters of one rank.

    Args:
        rank: of the bucket.
        runs: row of the tables, where the run begins and ends.
        tokens: of the whole batch.
        device: where the layers compute.
    """

    def __init__(self, rank: int, runs: Sequence[Long], tokens: int, device: torch.device) -> None:
        self.rank, self.runs, self.tokens = rank, tuple(runs), tokens
        self.long = tuple(run for run in runs if run.stop - run.start >= LONG)
        short = [run for run in runs if run.stop - run.start < LONG]
        self.short = _short(rank, short, tokens, device) if short else None
        self._others: Tensor | None = None
        self._device = device

    @property
    def others(self) -> Tensor:
        """True at rows of all adapters' A that are not the token's own (tokens, adapters · rank)."""
        if self._others is None:
            assert self.short is not None
            each = torch.arange(len(self.short.rows), device=self._device).repeat_interleave(self.rank)
            self._others = self.short.which[:, None] != each
        return self._others

    def by_row(self) -> Iterable[tuple[int, Tensor]]:
        """Each row of the tables with the indices of its tokens."""
        found: dict[int, list[int]] = {}
        for row, start, stop in self.runs:
            found.setdefault(row, []).extend(range(start, stop))
        return [(row, torch.tensor(indices, device=self._device)) for row, indices in found.items()]


class Plan:
    """The adapters of the tokens of one packed row.

    Args:
        runs: one after the other.
        device: where the layers compute.

    Attributes:
        tokens: how many there are.
        places: those of which some token is.
        groups: one for each rank among them.
    """

    def __init__(self, runs: Iterable[Run], device: torch.device | str = "cpu") -> None:
        self.runs = tuple(runs)
        by_rank: dict[int, list[Long]] = {}
        at = 0
        for place, count in self.runs:
            if place is not None and count:
                found = by_rank.setdefault(place.rank, [])
                if found and found[-1].row == place.row and found[-1].stop == at:
                    found[-1] = found[-1]._replace(stop=at + count)
                else:
                    found.append(Long(place.row, at, at + count))
            at += count
        self.tokens = at
        self.device = torch.device(device)
        self.places = frozenset(place for place, count in self.runs if place is not None and count)
        self.groups = tuple(Group(rank, found, at, self.device) for rank, found in by_rank.items())

    def of(self, place: Place) -> Tensor:
        """Indices of a place's tokens."""
        group = next(group for group in self.groups if group.rank == place.rank)
        return next(indices for row, indices in group.by_row() if row == place.row)


def _short(rank: int, runs: Sequence[Long], tokens: int, device: torch.device) -> Short:
    by_row: dict[int, list[int]] = {}
    for row, start, stop in runs:
        by_row.setdefault(row, []).extend(range(start, stop))
    used = sorted(by_row)
    span = range(used[0], used[-1] + 1)
    # Rows that lie together are used where they are, in one piece, though one between has no tokens.
    rows = tuple(span) if 2 * len(span) <= 3 * len(used) else tuple(used)
    which = [len(rows)] * tokens
    for position, row in enumerate(rows):
        for token in by_row.get(row, ()):
            which[token] = position
    count = sum(map(len, by_row.values()))
    plain = len(rows) == 1 and count == tokens
    longest = max(map(len, by_row.values()))
    order: list[int] = []
    keep: list[int] = []
    gather: list[int] = []
    for row in rows:
        own = by_row.get(row, [])
        keep += range(len(gather), len(gather) + len(own))
        order += own
        gather += own + [(own or [0])[-1]] * (longest - len(own))
    masked = plain or len(rows) * rank <= MASKED
    even = len(order) == longest * len(rows)
    together = even and order == list(range(order[0], order[0] + len(order)))
    return Short(
        rows,
        torch.tensor(which, device=device),
        None if masked else torch.tensor(gather, device=device),
        torch.tensor(order, device=device),
        torch.tensor(keep, device=device),
        plain,
        (order[0], order[-1] + 1) if together and not plain else None,
    )
