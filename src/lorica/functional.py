"""The arithmetic of a low-rank update, and nothing about modules.

        x ──────────── W0 ─────────────┐
        │                              + ──▶ y = W0·x + b + s·B·A·dropout(x)
        └─ dropout ─ A (d_in→r) ─ B ·s ┘

At small ranks the two thin products cost almost no arithmetic; what costs is reading and writing activations.
So forward and backward are fused by hand: the update is added into the base's output and the input's gradient
in place (`addmm_`, or `lorica.kernels` on a CPU), and what is kept for the backward pass is x, which the
layer's neighbours keep anyway, one bit per element for the dropout mask (a byte on a GPU), and A·x
(tokens × r).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica._shapes import Float
from lorica.choice import saving_hooks, traced
from lorica.kernels import thin
from lorica.kernels.masks import (
    drop_rate,
    keep_mask,
    kept_from,
    packed,
    random_bytes,
    unpacked,
)

_EVEN = 1 / 65504  # float16's largest number
_NARROW = 1024  # widths up to which `A·xᵀ` beats `x·Aᵀ` on a CPU, by a third


def dropout(x: Tensor, p: float) -> Tensor:
    """Drop elements of `x` at `drop_rate(p)` and scale the rest by 1 / (1 − rate)."""
    return x * keep_mask(x, p).to(x.dtype).div_(1 - drop_rate(p)) if p > 0 else x


def low_rank(
    x: Float[Tensor, "... d_in"],
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out r"],
    scale: float,
    p: float = 0.0,
) -> Float[Tensor, "... d_out"]:
    """The update alone, ``scale · B·A·dropout(x)``, in x's dtype, by plain differentiable operations."""
    dropped, A, B = dropout(x, p), A.to(x.dtype), B.to(x.dtype)
    if not _thin(x):
        return F.linear(F.linear(dropped, A), B).mul(scale)
    # How factors lie in memory decides how torch differentiates a product: here, by the fast products of
    # `low_rank_gradients`.
    y = (A @ dropped.reshape(-1, x.shape[-1]).t()).t() @ B.t().contiguous()
    return y.mul(scale).view(*x.shape[:-1], B.shape[0])


def needs_evening(scale: float) -> bool:
    """Whether half precision has no room for a scale."""
    return scale != 0 and not _EVEN < abs(scale) < 1 / _EVEN


def evened(A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """The factors with a scale that half precision has no room for divided between them; others as they are.

    What goes through the products, or comes back through them, is multiplied by the scale last: by one beyond
    65,504 a gradient overflows in float16, by one below 1/65,504 it vanishes.
    """
    if not needs_evening(scale):
        return A, B, scale
    root = math.sqrt(abs(scale))
    return A * root, B * math.copysign(root, scale), 1.0


def row_norm(
    weight: Float[Tensor, "d_out d_in"], A: Float[Tensor, "r d_in"], B: Float[Tensor, "d_out r"], scale: float
) -> Float[Tensor, " d_out"]:
    """Euclidean norm of each row of ``W0 + scale·B·A``, without forming it; no gradient flows through it.

    ``‖W0‖² + 2·scale·Σ B⊙(W0·Aᵀ) + scale²·Σ (B·A·Aᵀ)⊙B``, row by row: two thin products instead of a matrix
    of W0's size. In A's dtype, but the product with W0 in the lower of the two. No row's norm is quite 0, so
    that a magnitude over it is a number: 1 where both are of a row of zeros.
    """
    weight, A, B = weight.detach(), A.detach(), B.detach()  # tangents pass through `no_grad` alone
    with torch.no_grad():
        lower = min(weight.dtype, A.dtype, key=lambda dtype: dtype.itemsize)
        cross = (weight.to(lower) @ A.to(lower).t()).to(A.dtype)
        square = torch.linalg.vector_norm(weight, dim=1, dtype=A.dtype).square()
        square += (2 * scale) * (B * cross).sum(1) + scale**2 * ((B @ (A @ A.t())) * B).sum(1)
        return square.clamp_min_(torch.finfo(A.dtype).tiny).sqrt_()


def lora_linear(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out r"],
    scale: float,
    p: float = 0.0,
) -> Float[Tensor, "... d_out"]:
    """``W0·x + b + scale · B·A·dropout(x)`` in one step (Hu et al., 2021, eq. 3).

    A and B may be of higher precision than x (float32 masters beside a bfloat16 base): they are cast down for
    the products, and their gradients come back in their own dtype. Under autocast everything is computed in
    autocast's dtype, as `F.linear` would.

    Args:
        x: input, any number of leading dimensions.
        weight: W0. Gradients are formed for it, and for `bias`, only where they are asked for.
        bias: added to every row, or None.
        A: down-projection, r × d_in.
        B: up-projection, d_out × r.
        scale: α/r or α/√r.
        p: dropout probability on A's input; every token and every call has its own mask. 0 in evaluation.
    """
    device = x.device.type
    if x.dtype != torch.float64 and autocasts(device):  # which leaves float64 alone
        dtype = torch.get_autocast_dtype(device)
        x, weight, A, B = x.to(dtype), weight.to(dtype), A.to(dtype), B.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    if traced():  # a compiler fuses the plain form itself
        return F.linear(x, weight, bias) + low_rank(x, A, B, scale, p)
    if not torch.is_grad_enabled():  # without autograd's bookkeeping, which small batches feel
        return _sum(_half(x, A, B, scale, p), x.shape, weight, bias, B)
    with torch.no_grad():
        half = _half(x, A, B, scale, p)
    product = partial(_sum, half, x.shape, weight, bias, B)
    later = saving_hooks(True) is not None
    try:
        y = _LoraLinear.apply(x, weight, bias, A, B, half, None if later else product)
        y = y[0] if type(y) is tuple else y
        return _Product.apply(y, product) if later else y  # type: ignore[return-value]
    except _ForwardMode:
        return F.linear(x, weight, bias) + low_rank(x, A, B, scale, p)


def autocasts(device: str) -> bool:
    """Whether autocast is on; some devices (meta) do not know it."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def down(x: Tensor, A: Tensor) -> Tensor:
    """``x·Aᵀ`` (tokens, r), in the order of the product that is the faster on a CPU."""
    return (A @ x.t()).t() if x.shape[1] <= _NARROW else x @ A.t()


def _thin(x: Tensor) -> bool:
    """Whether products that give r numbers a token are faster as ``(r × d)·(d × tokens)``."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def add_low_rank_(
    y: Tensor, rows: Tensor, A: Tensor, B: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Add ``scale · B·A·(mask ⊙ rows)`` to y in place; returns u = A·(mask ⊙ rows), for `low_rank_gradients`.

    Args:
        y: (tokens, d_out), of whatever stride.
        rows: (tokens, d_in).
        A: (r, d_in), cast to y's dtype.
        B: (d_out, r), likewise.
        scale: α/r or α/√r, over the share that dropout keeps.
        mask: what `keep_mask` drew, or None.
    """
    kept = rows if mask is None else mask.to(rows.dtype).mul_(rows)
    u = down(kept, A.to(y.dtype))
    y.addmm_(u, B.to(y.dtype).t(), alpha=scale)
    return u


def low_rank_gradients(
    dy: Tensor,
    dx: Tensor | None,
    rows: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    mask: Tensor | None = None,
    u: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `add_low_rank_`, by hand: names follow the maths, g = Bᵀ·dy.

    Args:
        dy: gradient of y (tokens, d_out).
        dx: gradient of rows as far as it is known, added to in place; None where it is not wanted.
        rows: as there; None where A's gradient is not wanted.
        A: as there.
        B: as there.
        scale: as there.
        mask: as there.
        u: what that returned; None where B's gradient is not wanted.

    Returns:
        Gradients of A and B in their own dtypes.
    """
    lower_A, lower_B = A.to(dy.dtype), B.to(dy.dtype)
    g = (lower_B.t() @ dy.t()).t() if _thin(dy) else dy @ lower_B
    kept = None if mask is None else mask.to(dy.dtype)
    if dx is not None:
        if kept is None:
            dx.addmm_(g, lower_A, alpha=scale)
        else:
            dx.addcmul_(g @ lower_A, kept, value=scale)
    dA = dB = None
    # Products over all tokens are taken as (r × tokens)·(tokens × d): the other order is several times
    # slower on a CPU. With beta=0 what stands in the first place lends its shape alone.
    if u is not None:
        dB = torch.addmm(lower_B.t(), u.t(), dy, beta=0, alpha=scale).t().to(B.dtype)
    if rows is not None:
        kept = rows if kept is None else kept.mul_(rows)
        dA = torch.addmm(lower_A, g.t(), kept, beta=0, alpha=scale).to(A.dtype)
    return dA, dB


def low_rank_graph(
    dy: Tensor | None,
    rows: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    mask: Tensor | None = None,
    u: Tensor | None = None,
    du: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `low_rank_gradients`, by plain operations, for gradients that are differentiated again.

    Args:
        dy: as there; None where a gradient comes back to u alone.
        rows: as there; None where A is frozen.
        A: as there.
        B: as there.
        scale: as there.
        mask: as there.
        u: what `add_low_rank_` returned, where `rows` is None; else it is computed anew, from `rows`.
        du: gradient of u, or None.

    Returns:
        Gradient of rows, by way of the update alone; and those of A and B in their own dtypes.
    """
    given = dy if dy is not None else du
    assert given is not None
    lower_A, lower_B = A.to(given.dtype), B.to(given.dtype)
    kept = None if mask is None else mask.to(given.dtype)
    dropped = rows if rows is None or kept is None else rows * kept
    if dropped is not None:
        u = dropped @ lower_A.t()
    dB = None
    if dy is not None:
        g = (dy @ lower_B) * scale
        du = g if du is None else du + g
        dB = None if u is None else ((dy.t() @ u) * scale).to(B.dtype)
    assert du is not None
    through = du @ lower_A
    dA = None if dropped is None else (du.t() @ dropped).to(A.dtype)
    return through if kept is None else through * kept, dA, dB


def rows_of(shape: torch.Size) -> torch.Size:
    """A shape (..., d_in), as (tokens, d_in)."""
    return torch.Size((shape[:-1].numel(), shape[-1]))


def wants_graph() -> bool:
    """Whether the backward pass that runs is to be differentiated again, or seen by a transform."""
    return torch.is_grad_enabled() or traced()


class _Half(NamedTuple):
    """The part of `lora_linear` before the base's product; names follow the maths, u = A·x̃."""

    rows: Tensor
    bits: Tensor | None
    u: Tensor
    scale: float


def _half(x: Tensor, A: Tensor, B: Tensor, scale: float, p: float) -> _Half:
    rows, own = x.reshape(-1, x.shape[-1]), scale / (1 - drop_rate(p)) if p > 0 else scale
    if rows.numel() >= thin.LEAST and (kernels := thin.fit(rows, A, B)) is not None:
        u, bits = thin.down(kernels, rows, A, random_bytes(rows) if p > 0 else None, kept_from(p))
        return _Half(rows, bits, u, own)
    if p == 0:
        return _Half(rows, None, down(rows, A.to(rows.dtype)), own)
    mask = keep_mask(rows, p)
    return _Half(rows, packed(mask), down(mask.to(rows.dtype).mul_(rows), A.to(rows.dtype)), own)


def _sum(half: _Half, shape: torch.Size, weight: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
    y = F.linear(half.rows, weight, bias)
    if y.numel() >= thin.LEAST and (kernels := thin.fit(y, None, B)) is not None:
        thin.up(kernels, y, half.u, B, half.scale)
    else:
        y.addmm_(half.u, B.to(y.dtype).t(), alpha=half.scale)
    # Not a view to autograd: what follows may work in place on it (`ReLU(inplace=True)`, `x += ...`).
    return torch.ops.aten._unsafe_view.default(y, (*shape[:-1], y.shape[-1]))


class _ForwardMode(Exception):
    """Tangents are asked for (`torch.autograd.forward_ad`)."""


class _Product(torch.autograd.Function):
    """The output that `_LoraLinear` promised."""

    @staticmethod
    def forward(ctx: Any, promised: Tensor, product: Callable[[], Tensor]) -> Tensor:
        return product()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy, None


class _LoraLinear(torch.autograd.Function):
    """`lora_linear` by hand.

    Where torch has hooks on what is kept, the output is only promised, by a tensor without memory: what the
    backward pass needs is kept before the base's product is taken, as torch's own operations keep it. A
    checkpointed block is computed anew until all that is there: its last product is not taken again.

    Where A is frozen and B trains, x is not kept, for B's gradient needs u = A·x̃ alone. u is then an output
    as well, so that a second derivative finds its way through it to x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        half: _Half,
        product: Callable[[], Tensor] | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        wants_x, wants_weight, _, wants_A, wants_B = ctx.needs_input_grad[:5]
        needs_x = wants_weight or wants_A
        # x itself, not the rows made of it here: a graph of the gradient goes on through it.
        kept, u = x if needs_x else None, half.u if wants_B else None
        ctx.save_for_backward(kept, weight, A, B, half.bits, u)
        ctx.scale, ctx.shape = half.scale, x.shape
        y = x.new_empty(()).expand(*x.shape[:-1], weight.shape[0]) if product is None else product()
        if wants_x and wants_B and not needs_x:
            ctx.set_materialize_grads(False)
            return y, half.u
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, du: Tensor | None = None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # may be computed again for this, and once only
        device = saved[1].device.type
        if autocasts(device):  # what is in place must be of the forward pass's dtype
            with torch.autocast(device, enabled=False):
                return _LoraLinear.gradients(ctx, saved, dy, du)
        return _LoraLinear.gradients(ctx, saved, dy, du)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Leave it to plain operations."""
        raise _ForwardMode

    @staticmethod
    def gradients(ctx: Any, saved: Any, dy: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the forward pass's arguments, in their order."""
        if dy is None or du is not None or wants_graph():
            return _LoraLinear.graph(ctx, saved, dy, du)
        x, weight, A, B, bits, u = saved
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        wants_x, wants_weight, wants_bias, wants_A = ctx.needs_input_grad[:4]
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dy @ weight if wants_x else None
        dA: Tensor | None
        dB: Tensor | None
        if (
            rows is not None
            and u is not None
            and wants_A
            and rows.numel() >= thin.LEAST
            and thin.takes(dy)
            and (kernels := thin.fit(rows, A, B)) is not None
        ):
            g, dB = thin.beside(kernels, dy, B, u)
            dA, dB = thin.back(kernels, rows, bits, A, g, ctx.scale, dx).mul_(ctx.scale), dB.mul_(ctx.scale)
        else:
            mask = unpacked(bits, rows_of(ctx.shape))
            dA, dB = low_rank_gradients(dy, dx, rows if wants_A else None, A, B, ctx.scale, mask, u)
        dweight = dy.t() @ rows if wants_weight and rows is not None else None
        dbias = dy.sum(0) if wants_bias else None
        return None if dx is None else dx.view(ctx.shape), dweight, dbias, dA, dB, None, None

    @staticmethod
    def graph(ctx: Any, saved: Any, dy: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `gradients`, by operations that can be differentiated again."""
        x, weight, A, B, bits, u = saved
        mask = unpacked(bits, rows_of(ctx.shape))
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        dy = None if dy is None else dy.reshape(-1, dy.shape[-1])
        dx, dA, dB = low_rank_graph(dy, rows, A, B, ctx.scale, mask, u, du)
        dweight = dbias = None
        if dy is not None:
            dx = dx + dy @ weight
            dweight = None if rows is None else dy.t() @ rows
            dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx.reshape(ctx.shape), dweight, dbias, dA, dB, None, None
