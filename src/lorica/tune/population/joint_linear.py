"""One product with W0 for the rows of several models, and a segment of low-rank arithmetic for each.

    x₁ ─┐                 ┌─ + s₁·B₁·A₁·x̃₁ ──▶ y₁
    x₂ ─┼── W0·x + b ─────┼─ + s₂·B₂·A₂·x̃₂ ──▶ y₂
    x₃ ─┘                 └────────────────────▶ y₃

Rows need not be of one length: tokens are laid end to end, so nothing is padded for another's sake.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.functional import (
    add_low_rank_,
    drop_rate,
    keep_mask,
    low_rank_gradients,
    low_rank_graph,
    wants_graph,
)


class Segment(NamedTuple):
    """One model's rows, and its update of the layer.

    Args:
        x: input (..., d_in).
        A: down-projection (r, d_in); None where the layer carries no update.
        B: up-projection (d_out, r).
        scale: α/r or α/√r, over the share that dropout keeps.
        mask: which elements of x the update sees (tokens, d_in), 0 or 1; None for all.
    """

    x: Tensor
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 0.0
    mask: Tensor | None = None


def segment(x: Tensor, A: Tensor, B: Tensor, scale: float, p: float) -> Segment:
    """A segment whose dropout mask is drawn now, as `lorica.functional.lora_linear` would draw it."""
    if p == 0:
        return Segment(x, A, B, scale)
    return Segment(x, A, B, scale / (1 - drop_rate(p)), keep_mask(x.reshape(-1, x.shape[-1]), p))


def joint_linear(segments: Sequence[Segment], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """`lorica.functional.lora_linear` of each segment, the base's product taken once over all their rows.

    Args:
        segments: what goes in, all of one dtype.
        weight: W0 (d_out, d_in), frozen.
        bias: (d_out,), frozen, or None.

    Returns:
        The outputs (..., d_out). Gradients of each depend on its own loss alone, in whatever order or number
        the losses are summed.
    """
    scales = [part.scale for part in segments]
    masks = [part.mask for part in segments]
    tensors = [tensor for part in segments for tensor in (part.x, part.A, part.B)]
    return _JointLinear.apply(weight, bias, scales, masks, *tensors)  # type: ignore[no-any-return]


class _JointLinear(torch.autograd.Function):
    """`joint_linear` by hand; what is kept is what each segment would keep by itself."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        scales: Sequence[float],
        masks: Sequence[Tensor | None],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        xs, As, Bs = tensors[0::3], tensors[1::3], tensors[2::3]
        rows = [x.reshape(-1, x.shape[-1]) for x in xs if x is not None]
        y = F.linear(rows[0] if len(rows) == 1 else torch.cat(rows), weight, bias)
        outputs = y.split([len(part) for part in rows])
        us = [
            None if A is None or B is None else add_low_rank_(part, x, A, B, scale, mask)
            for part, x, A, B, scale, mask in zip(outputs, rows, As, Bs, scales, masks, strict=True)
        ]
        # x itself, not the rows made of it here: a graph of the gradient goes on through it.
        kept = [None if A is None else x for x, A in zip(xs, As, strict=True)]
        ctx.save_for_backward(weight, *kept, *As, *Bs, *masks, *us)
        ctx.scales, ctx.shapes = scales, [x.shape for x in xs if x is not None]
        ctx.set_materialize_grads(False)
        # Not views to autograd, as in `lora_linear`.
        return tuple(
            torch.ops.aten._unsafe_view.default(part, (*shape[:-1], part.shape[-1]))
            for part, shape in zip(outputs, ctx.shapes, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        weight, *saved = ctx.saved_tensors
        n = len(dys)
        xs, As, Bs, masks, us = (saved[i * n : (i + 1) * n] for i in range(5))
        rows = [None if x is None else x.reshape(-1, x.shape[-1]) for x in xs]
        wants = ctx.needs_input_grad[4:]
        gradients: list[Tensor | None] = [None] * (3 * n)
        # A segment whose loss never came back (its training ended in between) has none.
        live = [i for i, dy in enumerate(dys) if dy is not None]
        flat = {i: dy.reshape(-1, dy.shape[-1]) for i, dy in enumerate(dys) if dy is not None}
        if wants_graph():
            for i in live:
                dx = flat[i] @ weight
                if As[i] is not None:
                    through, *gradients[3 * i + 1 : 3 * i + 3] = low_rank_graph(
                        flat[i], rows[i], As[i], Bs[i], ctx.scales[i], masks[i]
                    )
                    dx = dx + through
                gradients[3 * i] = dx.reshape(ctx.shapes[i])
            return None, None, None, None, *gradients
        ask = [i for i in live if wants[3 * i]]
        parts: dict[int, Tensor] = {}
        if ask:
            dx = (flat[ask[0]] if len(ask) == 1 else torch.cat([flat[i] for i in ask])) @ weight
            parts = dict(zip(ask, dx.split([len(flat[i]) for i in ask]), strict=True))
        for i in live:
            if As[i] is not None:
                x = rows[i] if wants[3 * i + 1] else None
                u = us[i] if wants[3 * i + 2] else None
                gradients[3 * i + 1 : 3 * i + 3] = low_rank_gradients(
                    flat[i], parts.get(i), x, As[i], Bs[i], ctx.scales[i], masks[i], u
                )
            if i in parts:
                gradients[3 * i] = parts[i].view(ctx.shapes[i])
        return None, None, None, None, *gradients
