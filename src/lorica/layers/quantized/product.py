"""The product with a packed weight and a low-rank update beside it, with gradients written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.choice import traced
from lorica.errors import StateError
from lorica.functional import (
    autocasts,
    down,
    low_rank,
    low_rank_graph,
    rows_of,
    wants_graph,
)
from lorica.kernels.masks import drop_rate, keep_mask, packed, unpacked


def packed_linear(
    x: Float[Tensor, "... d_in"],
    multiply: Callable[[Tensor], Tensor],
    unpack: Callable[[], Tensor],
    bias: Float[Tensor, " d_out"] | None,
    A: Float[Tensor, "r d_in"] | None = None,
    B: Float[Tensor, "d_out r"] | None = None,
    scale: float = 0.0,
    p: float = 0.0,
) -> Float[Tensor, "... d_out"]:
    """`lora_linear` beside a packed weight, which is never kept unpacked.

    Gradients pass through the unpacked weight (Dettmers et al., 2023, eq. 5 and 6); where the packed product
    rounds its input, the rounding counts as the identity.

    Args:
        x: input, any number of leading dimensions.
        multiply: x → ``W0·x + bias`` from the packed weight, in memory of its own.
        unpack: returns W0 (d_out, d_in) in the dtype of the gradients' products; called in the backward pass.
        bias: the bias that `multiply` adds; its gradient is formed on request.
        A: down-projection; None for the product with W0 alone.
        B: up-projection.
        scale: α/r or α/√r.
        p: dropout probability on A's input, as in `lora_linear`.

    Returns:
        The output, in the dtype that `multiply` returns. The update is computed in x's dtype, or autocast's.
    """
    device = x.device.type
    autocast = x.dtype != torch.float64 and autocasts(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    if traced():
        y = multiply(x)
        return y if A is None or B is None else y + low_rank(x.to(dtype), A, B, scale, p).to(y.dtype)
    y = _PackedLinear.apply(x, bias, A, B, scale, p, dtype, multiply, unpack)
    return y[0] if type(y) is tuple else y  # type: ignore[return-value]


class _PackedLinear(torch.autograd.Function):
    """`packed_linear` by hand; names, and what is kept, as in `lorica.functional`'s `_LoraLinear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        scale: float,
        p: float,
        dtype: torch.dtype,
        multiply: Callable[[Tensor], Tensor],
        unpack: Callable[[], Tensor],
    ) -> Tensor | tuple[Tensor, Tensor]:
        y = multiply(x)
        ctx.unpack, ctx.shape, ctx.x_dtype, ctx.dtype = unpack, x.shape, x.dtype, dtype
        if A is None or B is None:
            ctx.save_for_backward(None, None, None, None, None)
            return y
        mask = None
        with torch.autocast(x.device.type, enabled=False):
            kept = rows = x.reshape(-1, x.shape[-1]).to(dtype)
            if p > 0:
                mask = keep_mask(rows, p)
                kept = mask.to(dtype).mul_(rows)
                scale /= 1 - drop_rate(p)
            u = down(kept, A.to(dtype))
            out = y.reshape(-1, y.shape[-1])
            if out.dtype == dtype:
                out.addmm_(u, B.to(dtype).t(), alpha=scale)
            else:
                out.add_(u @ B.to(dtype).t(), alpha=scale)
        wants_x, _, wants_A, wants_B = ctx.needs_input_grad[:4]
        ctx.save_for_backward(x if wants_A else None, A, B, packed(mask), u if wants_B else None)
        ctx.scale = scale
        # Not a view to autograd, as in `_LoraLinear`.
        y = torch.ops.aten._unsafe_view.default(out, y.shape)
        if wants_x and wants_B and not wants_A:
            ctx.set_materialize_grads(False)
            return y, u
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, du: Tensor | None = None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given = dy if dy is not None else du
        assert given is not None
        with torch.autocast(given.device.type, enabled=False):
            if dy is None or du is not None or wants_graph():
                return _PackedLinear.graph(ctx, dy, du)
            return _PackedLinear.gradients(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Refuse: the packed product itself has no tangent.

        Raises:
            StateError: always.
        """
        raise StateError(
            "forward-mode derivatives do not pass through a quantized layer's own product; take them by "
            "reverse mode (torch.autograd.functional.jvp), or on the unquantized base"
        )

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Of the forward pass's arguments, in their order."""
        x, A, B, bits, u = ctx.saved_tensors
        mask = unpacked(bits, rows_of(ctx.shape))
        wants_x, wants_bias = ctx.needs_input_grad[:2]
        dx = dbias = dA = dB = None
        dy = dy.reshape(-1, dy.shape[-1])
        if wants_x:
            weight = ctx.unpack()
            dx = (dy.to(weight.dtype) @ weight).to(ctx.x_dtype)
            del weight
        if wants_bias:
            dbias = dy.sum(0)
        if A is not None:
            dy = dy.to(ctx.dtype)
            g = dy @ B.to(ctx.dtype).mul(ctx.scale)
            kept = None if mask is None else mask.to(ctx.dtype)
            if dx is not None:
                through = g @ A.to(ctx.dtype)
                dx += through if kept is None else through.mul_(kept)
            if x is not None:
                rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
                dA = (g.t() @ (rows if kept is None else kept.mul_(rows))).to(A.dtype)
            if u is not None:
                dB = (u.t() @ dy).t().to(B.dtype).mul_(ctx.scale)
        dx = dx if dx is None else dx.view(ctx.shape)
        return dx, dbias, dA, dB, None, None, None, None, None

    @staticmethod
    def graph(ctx: Any, dy: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `gradients`, by operations that can be differentiated again."""
        x, A, B, bits, u = ctx.saved_tensors
        mask = unpacked(bits, rows_of(ctx.shape))
        dx = dbias = dA = dB = None
        dy = None if dy is None else dy.reshape(-1, dy.shape[-1])
        if A is not None:
            rows = None if x is None else x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            lower = None if dy is None else dy.to(ctx.dtype)
            dx, dA, dB = low_rank_graph(lower, rows, A, B, ctx.scale, mask, u, du)
            dx = dx.to(ctx.x_dtype)
        if dy is not None:
            weight, dbias = ctx.unpack(), dy.sum(0) if ctx.needs_input_grad[1] else None
            through = (dy.to(weight.dtype) @ weight).to(ctx.x_dtype)
            dx = through if dx is None else dx + through
        assert dx is not None
        return dx.reshape(ctx.shape), dbias, dA, dB, None, None, None, None, None
