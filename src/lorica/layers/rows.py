"""One adapter for each row of a batch, while the base runs once on all of them.

rows      topics  –  sentiment  topics            gather rows by adapter
             │    │      │        │               two batched products over the adapters' stacked factors
base(x)  ────┴────┴──────┴────────┘               add back where the rows stood
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.layers.axes import Axes

Effect = Callable[[str, Tensor, Tensor], Tensor]
"""(Adapter's name, rows of input, the base's rows of output) → what the adapter adds to the output."""
Stack = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Adapters' names → their A (adapters, r, d_in) and scaled B (adapters, r, d_out), padded to one rank."""


class Segments(NamedTuple):
    """Rows of a batch in the order of their adapters.

    Args:
        names: the adapters that have rows.
        counts: number of rows per adapter.
        order: indices of those rows in the batch, adapter by adapter; None for every row in its own order.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    order: Tensor | None


class Stacked(NamedTuple):
    """The arguments of two batched products over the adapters.

    Args:
        segments: the rows of each adapter.
        gather: indices of rows, repeated so that every adapter has the same number; None for every row in its
            own order.
        keep: positions in `gather` without the repeats; None without repeats.
        A: (adapters, r, d_in).
        B: (adapters, r, d_out), times the scale.
    """

    segments: Segments
    gather: Tensor | None
    keep: Tensor | None
    A: Tensor
    B: Tensor


@dataclass(eq=False)
class Rows:
    """The adapter of each row of a batch.

    Args:
        names: the adapter's name per row; None for the base.
        axes: whether the first axis of each layer's input is the batch.
    """

    names: tuple[str | None, ...]
    axes: Axes = field(default_factory=Axes, repr=False)
    _stacked: dict[tuple[Hashable, int, int, torch.dtype], Stacked | None] = field(
        default_factory=dict, repr=False
    )
    _answers: dict[Hashable, bool] = field(default_factory=dict, repr=False)

    def segments(self, layer: Hashable, x: Tensor, present: Collection[str]) -> Segments:
        """The rows of `x` whose adapter is among `present`.

        A layer may see every row several times in succession (beams, tokens folded into the batch).

        Raises:
            AdapterError: the first axis of `x` is not the batch, or its length does not fit the names.
        """
        only = self.names[0]
        if len(set(self.names)) == 1:  # the meaning of the axes does not matter
            acts = only is not None and only in present
            names, counts = ((only,), (x.shape[0],)) if acts else ((), ())
            return Segments(names, counts, None if acts else _indices([], x))  # type: ignore[arg-type]
        times = self.axes.times(layer, x, len(self.names))
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            if name is not None and name in present:
                rows.setdefault(name, []).extend(range(i * times, (i + 1) * times))
        order = [row for indices in rows.values() for row in indices]
        as_it_stands = order == list(range(x.shape[0]))
        index = None if as_it_stands else _indices(order, x)
        return Segments(tuple(rows), tuple(map(len, rows.values())), index)

    def add(self, layer: Hashable, y: Tensor, x: Tensor, present: Collection[str], effect: Effect) -> Tensor:
        """Add each row's adapter's update to its output; differentiable.

        Args:
            layer: the layer, or a key for it.
            y: the base's output, rows first.
            x: the layer's input, rows first.
            present: adapters that have an update for this layer.
            effect: computes one adapter's update.
        """
        names, counts, order = self.segments(layer, x, present)
        if not names:
            return y
        parts = ((t if order is None else t.index_select(0, order)).split(counts) for t in (x, y))
        delta = torch.cat([effect(*segment) for segment in zip(names, *parts, strict=True)])
        return y + delta if order is None else y.index_add(0, order, delta)

    def add_stacked_(
        self, y: Tensor, x: Tensor, layer: Hashable, present: Collection[str], stack: Stack
    ) -> Tensor:
        """As `add`, but in place and by two batched products for any number of adapters; for inference.

        Args:
            y: the base's output (rows, ..., d_out), contiguous; written to.
            x: the layer's input (rows, ..., d_in).
            layer: the key of this layer's stack; factors are stacked once per layer, number of rows and
                dtype.
            present: adapters that have an update for this layer.
            stack: stacks their factors.
        """
        key = (layer, x.dim(), x.shape[0], y.dtype)
        if key not in self._stacked:
            self._stacked[key] = _stacked(self.segments(layer, x, present), x, stack)
        plan = self._stacked[key]
        if plan is None:
            return y
        (names, _, order), gather, keep, A, B = plan
        rows = x if gather is None else x.index_select(0, gather)
        segments = rows.reshape(len(names), -1, x.shape[-1])
        # On a CPU a product is faster with the thin matrix on the left: A, unless there is only one token.
        u = torch.bmm(A, segments.mT).mT if segments.shape[1] > 1 else torch.bmm(segments, A.mT)
        if order is None and gather is None:
            y.view(len(names), -1, y.shape[-1]).baddbmm_(u, B)
            return y
        delta = torch.bmm(u, B).view(-1, *y.shape[1:])
        if keep is not None:
            delta = delta.index_select(0, keep)
        return y.add_(delta) if order is None else y.index_add_(0, order, delta)

    def forget(self) -> None:
        """Drop the stacked factors, because training may change them."""
        self._stacked.clear()
        self._answers.clear()

    def asked(self, layer: Hashable, question: Callable[[], bool]) -> bool:
        """The answer to a question about a layer, asked once: checking many adapters takes long."""
        if layer not in self._answers:
            self._answers[layer] = question()
        return self._answers[layer]

    def groups(
        self, layer: Hashable, x: Tensor, present: Collection[str]
    ) -> Iterator[tuple[str | None, Tensor]]:
        """Each adapter among `present` with the indices of its rows of `x`; None has the other rows."""
        names, counts, order = self.segments(layer, x, present)
        index = torch.arange(x.shape[0], device=x.device) if order is None else order
        yield from zip(names, index.split(counts), strict=True)
        rest = torch.ones(x.shape[0], dtype=torch.bool, device=x.device).index_fill_(0, index, False)
        if rest.any():
            yield None, rest.nonzero().flatten()


def _indices(order: list[int], x: Tensor) -> Tensor:
    return torch.tensor(order, dtype=torch.long, device=x.device)


def _stacked(segments: Segments, x: Tensor, stack: Stack) -> Stacked | None:
    names, counts, order = segments
    if not names:
        return None
    A, B = stack(names)
    even = len(set(counts)) == 1
    if even:
        gather, keep = order, None
    else:
        rows = list(range(x.shape[0])) if order is None else order.tolist()
        gather, keep = (torch.tensor(indices, device=x.device) for indices in _stretch(rows, counts))
    return Stacked(segments, gather, keep, A, B)


def _stretch(order: list[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Repeat each segment's last row up to the longest count; also returns the positions of the originals."""
    longest = max(counts)
    gather: list[int] = []
    keep: list[int] = []
    start = 0
    for count in counts:
        segment = order[start : start + count]
        keep += range(len(gather), len(gather) + count)
        gather += segment + [segment[-1]] * (longest - count)
        start += count
    return gather, keep
