"""Several sequences through one model at once, each alone with its length, its adapter and its cache.

    sequence 1   embed ─▶ norm ┊─▶ attention ┊─▶ norm ┊ …     each runs the model's own forward; at a frozen
    sequence 2   embed ─▶ norm ┊─▶ attention ┊─▶ norm ┊ …     linear layer it waits for the others
                               ┊             ┊
                        W0·[x₁ x₂ 0]   one product for the rows of all, filled up to a multiple of 16
                        + s·B·A·xᵢ     each adapter's part for its own sequence's rows

What a sequence gets does not depend on who else is there, to the last bit: everything but W0's product is
computed for it alone, and the rows of a product come out the same in any company, as long as there are 16 or
a multiple (`rows_stand_alone` asks the machine; where it says no, W0's products are taken alone as well).
Gradients of A and B are added where they belong sequence by sequence, in the sequences' order.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import require
from lorica.functional import add_low_rank_, low_rank_gradients
from lorica.service.engine.targets import is_linear
from lorica.service.engine.weights import LowRank, Weights

ROWS = 16
"""Rows of a product with W0 are a multiple of this."""


class Lane:
    """One sequence's way through the model.

    Args:
        weights: the adapter that acts on it; None for the base.
        work: runs the model; its result is the lane's.

    Attributes:
        done: whether it has ended.
        result: what `work` returned.
        error: what it raised instead.
    """

    def __init__(self, weights: Weights | None, work: Callable[[Lane], Any]) -> None:
        """Start nothing yet."""
        greenlet = require("greenlet", extra="service").greenlet
        self.weights = weights
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None
        self._work = work
        self._routine = greenlet(self._run)
        self._routine.gr_context = contextvars.copy_context()
        self._routine.lane = self
        self.waiting: tuple[int, nn.Module | None, Tensor | None] | None = None

    def linear(self, order: int, module: nn.Module, x: Tensor) -> Tensor:
        """A frozen layer's output for `x`, with the lane's own update. Call it from inside the lane."""
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

    def _run(self, _: Any) -> None:
        try:
            self.result = self._work(self)
        except Exception as error:
            self.error = error


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
        _, module, _ = min((lane.waiting for lane in waiting), key=lambda at: at[0])  # type: ignore[index, return-value, misc]
        there = [lane for lane in waiting if lane.waiting[1] is module]  # type: ignore[index]
        parts = [Part(lane.waiting[2], _update(lane, module)) for lane in there]  # type: ignore[index, arg-type]
        for lane, y in zip(there, together(module, parts), strict=True):
            lane.resume(y)


def _update(lane: Lane, module: nn.Module | None) -> LowRank | None:
    return None if lane.weights is None else lane.weights.of(module)


class Joint:
    """A model whose frozen linear layers lanes share.

    Args:
        model: any causal model; nothing of it is changed but while `joined` holds.
        head: the layer that makes the logits; lanes call it by `Lane.linear` themselves.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None) -> None:
        """Look for the layers."""
        self.order = {
            module: i
            for i, module in enumerate(model.modules())
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


class Part(NamedTuple):
    """One sequence's share of a product.

    Args:
        x: its rows (..., d_in).
        update: its adapter's A and B, and where their gradients go; None for the base alone.
    """

    x: Tensor
    update: LowRank | None = None


def together(module: Any, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """A linear layer's outputs for each part, W0's product taken once for all.

    Under gradients, those of A and B are added to `LowRank.dA` and `LowRank.dB` in the parts' order.
    """
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    if len(parts) > 1 and not rows_stand_alone(weight):
        return tuple(
            _Together.apply(_anchor(), weight, module.bias, (part,), part.x)[0]  # type: ignore[index]
            for part in parts
        )
    xs = [part.x for part in parts]
    return _Together.apply(_anchor(), weight, module.bias, parts, *xs)  # type: ignore[no-any-return]


def _anchor() -> Tensor:
    # The first layer's input needs no gradient, but what is behind it does.
    return torch.empty(0, requires_grad=True)


def _product(rows: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[rows]·Wᵀ + b`` with zero rows at the end, up to a multiple of `ROWS`."""
    n = sum(map(len, rows))
    more = -n % ROWS
    if more:
        rows = [*rows, rows[0].new_zeros(more, rows[0].shape[1])]
    return F.linear(rows[0] if len(rows) == 1 else torch.cat(list(rows)), weight, bias)[:n]


class _Together(torch.autograd.Function):
    """`together` by hand."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], *xs: Tensor
    ) -> tuple[Tensor, ...]:
        rows = [x.reshape(-1, x.shape[-1]) for x in xs]
        outputs = _product(rows, weight, bias).split([len(part) for part in rows])
        us = [
            None if update is None else add_low_rank_(y, x, update.A, update.B, update.scale)
            for y, x, (_, update) in zip(outputs, rows, parts, strict=True)
        ]
        kept = [None if u is None else x for x, u in zip(rows, us, strict=True)]
        ctx.save_for_backward(weight, *kept, *us)
        ctx.updates, ctx.shapes = [part.update for part in parts], [x.shape for x in xs]
        ctx.set_materialize_grads(False)
        # Not views to autograd: what follows may work in place on them.
        return tuple(
            torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))
            for y, x in zip(outputs, xs, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        weight, *saved = ctx.saved_tensors
        n = len(dys)
        rows, us = saved[:n], saved[n:]
        live = [i for i, dy in enumerate(dys) if dy is not None]
        flat = {i: dy.reshape(-1, dy.shape[-1]) for i, dy in enumerate(dys) if dy is not None}
        ask = [i for i in live if ctx.needs_input_grad[4 + i]]
        dxs: dict[int, Tensor] = {}
        if ask:
            dx = _product([flat[i] for i in ask], weight.t())
            dxs = dict(zip(ask, dx.split([len(flat[i]) for i in ask]), strict=True))
        for i in live:
            update = ctx.updates[i]
            if update is not None:
                trains = update.dA is not None
                dA, dB = low_rank_gradients(
                    flat[i],
                    dxs.get(i),
                    rows[i] if trains else None,
                    update.A,
                    update.B,
                    update.scale,
                    None,
                    us[i] if trains else None,
                )
                if trains:
                    update.dA.add_(dA)
                    update.dB.add_(dB)
        gradients = [dxs[i].view(ctx.shapes[i]) if i in dxs else None for i in range(n)]
        return None, None, None, None, *gradients


_STAND_ALONE: dict[tuple[Any, ...], bool] = {}


def rows_stand_alone(weight: Tensor) -> bool:
    """Whether a row's product with a weight has the same bits in any company of a multiple of `ROWS` rows.

    BLAS libraries choose their kernels by the number of rows. Asked once for each shape, dtype and number of
    threads, by trying. Off the CPU the answer is yes: there the same bits are not promised.
    """
    if weight.device.type != "cpu":
        return True
    key = (weight.shape, weight.stride(), weight.dtype, torch.get_num_threads())
    if key not in _STAND_ALONE:
        _STAND_ALONE[key] = _try(weight.detach()) and _try(weight.detach().t())
    return _STAND_ALONE[key]


def _try(weight: Tensor) -> bool:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(24 * ROWS, weight.shape[1], generator=random).to(weight.dtype)
    whole = F.linear(x, weight)
    for blocks in (1, 2, 3, 7, 16, 23):
        rows = torch.randperm(len(x), generator=random)[: blocks * ROWS]
        if not torch.equal(F.linear(x[rows], weight), whole[rows]):
            return False
    return True
