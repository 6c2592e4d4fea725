"""Sequences on their way through one model, each with the bits that it has alone.

    lane 1 (3 sequences of 8)    embed ─▶ norm ┊─▶ attention ┊─▶ norm ┊ …   each lane runs the model's own
    lane 2 (1 sequence of 24)    embed ─▶ norm ┊─▶ attention ┊─▶ norm ┊ …   forward; at a frozen linear layer
                                               ┊             ┊              it waits for the others
                                        W0·[x₁ x₂ 0]   one product for the rows of all, filled up
                                        + s·B·A·xᵢ     one for the rows of each adapter in a lane

What a sequence gets does not depend on who else is there, to the last bit: the rows of a product come out the
same in any company, as long as there are 4 or a multiple (`rows_stand_alone` asks the machine; where nothing
helps, products are taken sequence by sequence), and everything else is computed lane by lane (`abreast` says
who can share one). Gradients of A and B are added sequence by sequence, in the sequences' order.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import require
from lorica.service.engine.targets import is_linear
from lorica.service.engine.weights import LowRank, Weights, numbered

ROWS = 16
"""Rows of a product are a multiple of this at most."""
_LINE = 64  # bytes: products of tensors that begin at such a place round the same wherever they lie


class Lane:
    """Sequences of one length on their way through the model, abreast.

    Args:
        weights: the adapter that acts on each; None for the base. Those of one adapter stand side by side.
        work: runs the model; its result is the lane's.
        places: of the sequences in the order in which gradients are added; None for their own order.

    Attributes:
        done: whether it has ended.
        result: what `work` returned.
        error: the error that it raised instead.
    """

    def __init__(
        self,
        weights: Sequence[Weights | None],
        work: Callable[[Any], Any],
        places: Sequence[int] | None = None,
    ) -> None:
        """Start nothing yet."""
        greenlet = require("greenlet", extra="service").greenlet
        self.hold(weights, places)
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None
        self._work = work
        self._routine = greenlet(self._run)
        self._routine.gr_context = contextvars.copy_context()
        self._routine.lane = self
        self.waiting: tuple[int, nn.Module | None, Tensor | None] | None = None

    def hold(self, weights: Sequence[Weights | None], places: Sequence[int] | None = None) -> None:
        """From now on these sequences are in it; arguments as there."""
        self.places = range(len(weights)) if places is None else places
        self.sharers: list[tuple[Weights | None, int, int]] = []
        for own, group in groupby(weights):
            first = self.sharers[-1][2] if self.sharers else 0
            self.sharers.append((own, first, first + len(list(group))))

    def linear(self, order: int, module: nn.Module, x: Tensor) -> Tensor:
        """A frozen layer's output for `x`, with the sequences' own updates. Call it from inside the lane."""
        if len(self.places) > 1 and x.numel() // x.shape[-1] % len(self.places):
            raise RuntimeError("the rows of a layer are not those of the sequences, one after the other")
        return self._routine.parent.switch((order, module, x))

    def pause(self) -> None:
        """Wait until all lanes pause or end. Call it from inside the lane."""
        self._routine.parent.switch((_LAST, None, None))

    def resume(self, answer: Tensor | None = None) -> None:
        """Go on until the lane waits again, or ends."""
        self._routine.parent = _current()
        self.waiting = self._routine.switch(answer)
        self.done = self.waiting is None

    def abandon(self) -> None:
        """End it where it stands."""
        if not self.done and self._routine:
            self._routine.throw()
        self.done = True

    def part(self, order: int, x: Tensor) -> Part:
        """Its share of a layer's product."""
        layer = order % HEAD
        shares = [Share(None if own is None else own.of(layer), *span) for own, *span in self.sharers]
        return Part(x, shares, self.places)

    def _run(self, _: Any) -> None:
        try:
            self.result = self._work(self)
        except Exception as error:
            self.error = error


HEAD = 1 << 29
"""The output head comes behind all other layers; added to its number."""
_LAST = 1 << 30


def _current() -> Any:
    return require("greenlet", extra="service").getcurrent()


def run(lanes: Sequence[Lane]) -> None:
    """Take lanes on until each of them has ended or pauses."""
    for lane in lanes:
        lane.resume()
    while True:
        waiting = [lane for lane in lanes if lane.waiting is not None and lane.waiting[1] is not None]
        if not waiting:
            return
        # Those that are ahead wait for those behind, so that all meet at each layer.
        order, module, _ = min((lane.waiting for lane in waiting), key=lambda at: at[0])  # type: ignore[index, return-value, misc]
        there = [lane for lane in waiting if lane.waiting[1] is module]  # type: ignore[index]
        parts = [lane.part(order, lane.waiting[2]) for lane in there]  # type: ignore[index, arg-type]
        for lane, y in zip(there, together(module, parts), strict=True):
            lane.resume(y)


class Joint:
    """A model whose frozen linear layers lanes share.

    Args:
        model: any causal model; nothing of it is changed but while `joined` holds.
        head: the layer that makes the logits; lanes call it by `Lane.linear` themselves.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None) -> None:
        """Look for the layers."""
        self.order = {
            module: number
            for module, number in numbered(model).items()
            if is_linear(module) and module is not head and "forward" not in vars(module)
        }

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Within it, lanes wait for one another at these layers."""
        for module, order in self.order.items():
            vars(module)["forward"] = functools.partial(_forward, module, order)
        try:
            yield
        finally:
            for module in self.order:
                del vars(module)["forward"]


def _forward(module: nn.Module, order: int, x: Tensor) -> Tensor:
    lane = getattr(_current(), "lane", None)
    return type(module).forward(module, x) if lane is None else lane.linear(order, module, x)


class Share(NamedTuple):
    """Sequences of a lane that have one adapter.

    Args:
        update: its A and B, and where their gradients go; None for the base alone.
        first: the first of these sequences.
        last: the one behind the last.
    """

    update: LowRank | None
    first: int
    last: int


class Part(NamedTuple):
    """One lane's share of a product.

    Args:
        x: its rows (..., d_in), sequence by sequence.
        shares: whose they are.
        places: of the sequences in the order of gradients.
    """

    x: Tensor
    shares: Sequence[Share]
    places: Sequence[int]

    @classmethod
    def of(cls, x: Tensor, update: LowRank | None, place: int) -> Part:
        """Of one sequence."""
        return cls(x, [Share(update, 0, 1)], [place])


def together(module: Any, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """A linear layer's outputs for each part, W0's product taken once for all.

    Under gradients, those of A and B are added to `LowRank.dA` and `LowRank.dB` in the order of places.
    """
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    if not torch.is_grad_enabled():
        outputs, *_ = _products(weight, module.bias, parts)
        return tuple(y.view(*part.x.shape[:-1], -1) for y, part in zip(outputs, parts, strict=True))
    # The first layer's input needs no gradient, but what is behind it does.
    anchor = torch.empty(0, requires_grad=True)
    xs = [part.x for part in parts]
    return _Together.apply(anchor, weight, module.bias, parts, *xs)  # type: ignore[no-any-return]


def _times(
    xs: Sequence[Tensor], lengths: Sequence[int], weight: Tensor, bias: Tensor | None = None
) -> Sequence[Tensor]:
    """``x·Wᵀ + b`` for each x, of sequences of so many rows."""
    unit = rows_stand_alone(weight)
    if unit:
        if len(xs) == 1:
            return [_filled(xs[0], unit, weight, bias)]
        return _filled(torch.cat(list(xs)), unit, weight, bias).split([len(x) for x in xs])
    return [
        torch.cat([_filled(_rows(x, i, i + n), ROWS, weight, bias) for i in range(0, len(x), n)])
        if n
        else x @ weight.t()
        for x, n in zip(xs, lengths, strict=True)
    ]


def _filled(rows: Tensor, unit: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product with zero rows at the end, up to a multiple of `unit`."""
    n = rows.shape[0]
    if n % unit == 0:
        return F.linear(rows, weight, bias)
    return F.linear(torch.constant_pad_nd(rows, (0, 0, 0, -n % unit)), weight, bias)[:n]


def _rows(tensor: Tensor, first: int, last: int) -> Tensor:
    """Some rows, at a place of memory where products with them round as if they were alone."""
    if first == 0 and last == tensor.shape[0]:
        return tensor
    part = tensor[first:last]
    return part.clone() if first * tensor.stride(0) * tensor.itemsize % _LINE else part


class _Thin:
    """Products with factors of one layer's adapters: the machine is asked once for each rank."""

    def __init__(self) -> None:
        self._units: dict[torch.Size, int] = {}

    def __call__(self, x: Tensor, n: int, factor: Tensor) -> Tensor:
        """``x·factorᵀ``, of sequences of `n` rows."""
        shape = factor.shape
        unit = self._units.get(shape)
        if unit is None:
            unit = self._units[shape] = rows_stand_alone(factor)
        return _filled(x, unit, factor, None) if unit else _times([x], [n], factor)[0]


def _products(
    weight: Tensor, bias: Tensor | None, parts: Sequence[Part]
) -> tuple[Sequence[Tensor], list[Tensor], list[int], list[Tensor]]:
    """The outputs; what they were made of: rows, rows of a sequence, A·x of each share."""
    rows = [part.x.reshape(-1, part.x.shape[-1]) for part in parts]
    lengths = [x.shape[0] // len(part.places) for x, part in zip(rows, parts, strict=True)]
    outputs = _times(rows, lengths, weight, bias)
    us, thin = [], _Thin()
    for part, n, x, y in zip(parts, lengths, rows, outputs, strict=True):
        for update, first, last in part.shares:
            if update is None:
                continue
            u = thin(_rows(x, n * first, n * last), n, update.A.to(y.dtype))
            more = thin(u, n, update.B.to(y.dtype))
            y[n * first : n * last].add_(more, alpha=update.scale)
            us.append(u)
    return outputs, rows, lengths, us


class _Together(torch.autograd.Function):
    """`together` by hand; names follow the maths: u = A·x, g = Bᵀ·dy."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], *xs: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, rows, lengths, us = _products(weight, bias, parts)
        ctx.save_for_backward(weight, *rows, *us)
        ctx.parts, ctx.lengths = [part._replace(x=None) for part in parts], lengths
        ctx.shapes = [x.shape for x in xs]
        ctx.set_materialize_grads(False)
        # Not views to autograd: what follows may work in place on them.
        return tuple(
            torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))
            for y, x in zip(outputs, xs, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        weight, *saved = ctx.saved_tensors
        rows, us = saved[: len(dys)], iter(saved[len(dys) :])
        flat = {i: dy.reshape(-1, dy.shape[-1]) for i, dy in enumerate(dys) if dy is not None}
        ask = [i for i in flat if ctx.needs_input_grad[4 + i]]
        dxs: dict[int, Tensor] = {}
        if ask:
            products = _times([flat[i] for i in ask], [ctx.lengths[i] for i in ask], weight.t())
            dxs = dict(zip(ask, products, strict=True))
        found: list[tuple[int, LowRank, tuple[Tensor, ...], int, int]] = []
        thin = _Thin()
        for i, (part, n) in enumerate(zip(ctx.parts, ctx.lengths, strict=True)):
            for update, first, last in part.shares:
                if update is None:
                    continue
                u = next(us)
                if i not in flat:
                    continue
                start, stop = n * first, n * last
                dy = _rows(flat[i], start, stop)
                g = thin(dy, n, update.B.to(dy.dtype).t())
                if i in dxs:
                    more = thin(g, n, update.A.to(dy.dtype).t())
                    dxs[i][start:stop].add_(more, alpha=update.scale)
                if update.dA is not None:
                    own = g, _rows(rows[i], start, stop), u, dy
                    found += [(part.places[j], update, own, n * (j - first), n) for j in range(first, last)]
        for _, update, (g, x, u, dy), at, n in sorted(found, key=lambda item: item[0]):
            _add(update.dA, _rows(g, at, at + n), _rows(x, at, at + n), update.scale)  # type: ignore[arg-type]
            _add(update.dB.t(), _rows(u, at, at + n), _rows(dy, at, at + n), update.scale)  # type: ignore[union-attr]
        gradients = [dxs[i].view(ctx.shapes[i]) if i in dxs else None for i in range(len(dys))]
        return None, None, None, None, *gradients


def _add(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``total += scale·leftᵀ·right``: (r × tokens)·(tokens × d), the faster order on a CPU."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right, alpha=scale)
    else:
        total.add_(left.t() @ right, alpha=scale)


_STAND_ALONE: dict[tuple[Any, ...], int] = {}


def rows_stand_alone(weight: Tensor) -> int:
    """Of which number of rows products with a weight give each row the bits that it has in any company.

    BLAS libraries choose their kernels by the number of rows. Asked once for each shape, dtype and number of
    threads, by trying. Off the CPU the same bits are not promised, and nobody is asked.

    Returns:
        A number, of which all multiples do as well: 4, 8 or `ROWS`; or 0 where there is none.
    """
    if weight.device.type != "cpu":
        return 1
    key = (weight.shape, weight.stride(), weight.dtype, torch.get_num_threads())
    found = _STAND_ALONE.get(key)
    if found is None:
        own = weight.detach()
        found = next((unit for unit in (4, 8, ROWS) if _try(own, unit) and _try(own.t(), unit)), 0)
        _STAND_ALONE[key] = found
    return found


def _try(weight: Tensor, unit: int) -> bool:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(24 * ROWS, weight.shape[1], generator=random).to(weight.dtype)
    whole = F.linear(x, weight)
    for blocks in (1, 2, 3, 5, 7, 16, 23):
        rows = torch.randperm(len(x), generator=random)[: blocks * unit]
        if not torch.equal(F.linear(x[rows], weight), whole[rows]):
            return False
    return True
