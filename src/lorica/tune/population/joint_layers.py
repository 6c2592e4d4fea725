"""One product with W0 for the rows of several models, and a segment of low-rank arithmetic for each.

    x₁ ─┐                 ┌─ + s₁·B₁·A₁·x̃₁ ──▶ y₁
    x₂ ─┼── W0·x + b ─────┼─ + s₂·B₂·A₂·x̃₂ ──▶ y₂
    x₃ ─┘                 └────────────────────▶ y₃

Rows need not be of one length: tokens are laid end to end, so nothing is padded for another's sake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.functional import (
    add_low_rank_,
    low_rank_gradients,
    low_rank_graph,
    wants_graph,
)
from lorica.kernels.masks import drop_rate, keep_mask
from lorica.layers import LoraLayer, LoraLinear
from lorica.layers.linear import LoraConv1D
from lorica.layers.variants import PLAIN
from lorica.tune.population.coroutines import Coroutine, SyncPoint


def module_order(base: nn.Module) -> dict[str, int]:
    """Module path → how early it comes, for `join_layers` of the base's copies."""
    return {path: order for order, (path, _) in enumerate(base.named_modules())}


def join_layers(
    model: nn.Module, coroutine: Coroutine[Any], places: Mapping[str, int], apart: nn.Module | None = None
) -> None:
    """Compute a model's frozen linear layers together with those of other coroutines, in training.

    Args:
        model: a shared copy of the base, adapted.
        coroutine: the one that trains the model.
        places: of the base's modules; adapters add others.
        apart: a module to leave alone, such as the head of a language model, whose loss calls it in pieces.
    """
    for path, module in model.named_modules():
        if path in places and module is not apart and _is_joint(module):
            vars(module)["forward"] = partial(_forward, module, coroutine, places[path])


def _is_joint(module: nn.Module) -> bool:
    if isinstance(module, LoraLayer):
        known = module.mixin() in (LoraLinear, LoraConv1D) and module.base_class in (nn.Linear, Conv1D)
    else:
        known = type(module) in (nn.Linear, Conv1D)
    return known and "forward" not in vars(module)


def _forward(module: nn.Module, coroutine: Coroutine[Any], order: int, x: Tensor) -> Tensor:
    """The layer's own forward in evaluation and where it is not frozen; else the coroutines' together."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    part = None if trained or not torch.is_grad_enabled() else _segment(module, x)
    if part is None:
        return type(module).forward(module, x)
    # A base that quantization, a start or trained biases changed for one coroutine is not the others'.
    key = (order, id(weight), id(bias), part.x.dtype)
    return coroutine.synchronize(SyncPoint(order, key, partial(_serve, module, weight, bias)), part)


def _segment(module: nn.Module, x: Tensor) -> Segment | None:
    """The coroutine's rows and its update; None where that is more than a product of two factors."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    if not isinstance(module, LoraLinear):
        return Segment(x)
    names = module.acting()
    if not names:
        return Segment(x)
    plain = len(names) == 1 and module.variants[names[0]] is PLAIN
    return segment(x, *module.update_of(names[0])) if plain else None


def _serve(
    module: nn.Module, weight: Tensor, bias: Tensor | None, segments: Sequence[Segment]
) -> tuple[Tensor, ...]:
    stored_transposed = isinstance(module, (Conv1D, LoraConv1D))
    dtype = segments[0].x.dtype  # autocast's where that is on; a weight is cast once for all coroutines then
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return joint_linear(segments, weight.t() if stored_transposed else weight, bias)


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
        segments: the inputs, all of one dtype.
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
    """`joint_linear` by hand; it keeps the tensors that each segment would keep by itself."""

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
