"""One adapter for each row of a batch, while the base runs once on all of them.

rows      topics  –  sentiment  topics            gather rows by adapter
             │    │      │        │               two batched products over the adapters' stacked factors
base(x)  ────┴────┴──────┴────────┘               add back where the rows stood
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.layers.rows.axes import Axes, ByRow
from lorica.layers.rows.stack import Stack, stacked
from lorica.layers.variants import PLAIN

Effect = Callable[[str, Tensor, Tensor], Tensor]
"""(Adapter's name, rows of input, the base's rows of output) → what the adapter adds to the output."""


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


_THIN = 4
"""Tokens of an adapter up to which reading its factors is what a product costs."""


class Layout(NamedTuple):
    """The places of the rows of a stack's adapters.

    Args:
        order: indices of the rows, adapter by adapter; None for every row in its own order.
        gather: the same, repeated so that every adapter has as many; None for every row in its own order.
        keep: positions in `gather` without the repeats; None without repeats.
    """

    order: Tensor | None
    gather: Tensor | None
    keep: Tensor | None


@dataclass(eq=False)
class Rows(ByRow):
    """The adapter of each row of a batch.

    Args:
        names: the adapter's name per row; None for the base.
        axes: whether the first axis of each layer's input is the batch.

    Attributes:
        distinct: the names, each once.
        kept: memory that must live as long.
    """

    names: tuple[str | None, ...]
    axes: Axes = field(default_factory=Axes, repr=False)

    def __post_init__(self) -> None:
        self.distinct = tuple(dict.fromkeys(self.names))
        self._named = frozenset(name for name in self.distinct if name is not None)
        self._acting = tuple(name for name in self.distinct if name is not None)
        self._plans: dict[Hashable, list[tuple[Stack, Layout]]] = {}
        self._layouts: dict[Hashable, Layout] = {}
        self._indices: dict[Hashable, dict[str, list[int]]] = {}
        self._plain: dict[Hashable, bool] = {}
        self.kept: list[Tensor] = []

    def segments(self, layer: Hashable, x: Tensor, present: Collection[str]) -> Segments:
        """The rows of `x` whose adapter is among `present`.

        A layer may see every row several times in succession (beams, tokens folded into the batch).

        Raises:
            AdapterError: the first axis of `x` is not the batch, or its length does not fit the names.
        """
        rows = self._rows(layer, x, present)
        order = _layout(rows, tuple(rows), x, even=False).order
        return Segments(tuple(rows), tuple(map(len, rows.values())), order)

    def _rows(self, layer: Hashable, x: Tensor, present: Collection[str]) -> Mapping[str, list[int]]:
        """Adapter → indices of its rows of `x`, for those among `present`."""
        acting = self._acting
        if not self._named.issubset(present):
            acting = tuple(name for name in acting if name in present)
        if len(self.distinct) == 1:  # the meaning of the axes does not matter
            return {name: list(range(x.shape[0])) for name in acting}
        times = self.axes.times(layer, x, len(self.names))
        key = times, acting
        if key not in self._indices:
            rows: dict[str, list[int]] = {name: [] for name in acting}
            for i, name in enumerate(self.names):
                if name in rows:
                    rows[name] += range(i * times, (i + 1) * times)
            self._indices[key] = rows
        return self._indices[key]

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

    def linear(self, layer: Any, x: Tensor) -> Tensor | None:
        """A linear layer's output with each row's update, by two batched products for any number of adapters.

        Args:
            layer: the adapted layer (`LoraLinear`).
            x: its input (rows, ..., d_in).

        Returns:
            (rows, ..., d_out). None where `add` must take one adapter after another: under gradients, with
            dropout, and where an adapter does more than add its product.
        """
        if torch.is_grad_enabled():  # training may change the factors
            self._plans.clear()
            self._plain.clear()
            return None
        if layer.training and any(layer.lora_dropout.values()):
            return None
        if layer not in self._plain:  # once, for to ask each of many adapters takes long
            self._plain[layer] = {PLAIN}.issuperset(layer.variants.values())
        if not self._plain[layer]:
            return None
        y = layer.base_forward(x)
        key = (layer, x.dim(), x.shape[0], y.dtype)
        if key not in self._plans:
            self._plans[key] = self._plan(layer, x, y.dtype)
        for stack, layout in self._plans[key]:
            _add_(y, x, stack, layout)
        return y

    def _plan(self, layer: Any, x: Tensor, dtype: torch.dtype) -> list[tuple[Stack, Layout]]:
        rows = self._rows(layer, x, layer.scaling.keys())
        plan = []
        tokens = x.numel() // (x.shape[-1] or 1) // (len(rows) or 1)
        # A copy reads and writes what is then read again: so thrice as much may be read as is needed.
        gaps = 2.0 if tokens <= _THIN else 0.0
        for stack in stacked(layer, dtype, tuple(rows), self, gaps) if rows else ():
            names = tuple(stack.names)
            key = names, x.shape[0], x.device
            if key not in self._layouts:
                self._layouts[key] = _layout(rows, names, x, even=True)
            plan.append((stack, self._layouts[key]))
        return plan

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


def _layout(rows: Mapping[str, list[int]], names: Sequence[str | None], x: Tensor, *, even: bool) -> Layout:
    """The rows of adapters in a given order, each brought to as many where `even` asks for that."""
    each = [[] if name is None else rows[name] for name in names]
    order = [row for own in each for row in own]
    as_it_stands = order == list(range(x.shape[0]))
    index = None if as_it_stands else torch.tensor(order, dtype=torch.long, device=x.device)
    longest = max(map(len, each), default=0)
    if not even or len(order) == longest * len(names):
        return Layout(index, index, None)
    gather: list[int] = []
    keep: list[int] = []
    for own in each:
        keep += range(len(gather), len(gather) + len(own))
        gather += own + [(own or order)[-1]] * (longest - len(own))
    return Layout(index, *(torch.tensor(indices, device=x.device) for indices in (gather, keep)))


def _add_(y: Tensor, x: Tensor, stack: Stack, layout: Layout) -> None:
    names, A, B, scale = stack
    order, gather, keep = layout
    rows = x if gather is None else x.index_select(0, gather)
    segments = rows.reshape(len(names), -1, x.shape[-1])
    # On a CPU a product is faster with the thin matrix on the left: A, unless there is only one token.
    u = torch.bmm(A, segments.mT).mT if segments.shape[1] > 1 else torch.bmm(segments, A.mT)
    if isinstance(scale, Tensor):
        u, scale = u * scale, 1.0
    if order is None and gather is None:
        y.view(len(names), -1, y.shape[-1]).baddbmm_(u, B.mT, alpha=scale)
        return
    delta = torch.bmm(u, B.mT).view(-1, *y.shape[1:])
    if keep is not None:
        delta = delta.index_select(0, keep)
    if order is None:
        y.add_(delta, alpha=scale)
    else:
        y.index_add_(0, order, delta, alpha=scale)
