"""The frozen linear layers of several models over one base, computed in one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.layers import LoraLayer, LoraLinear
from lorica.layers.linear import LoraConv1D
from lorica.tune.population.coroutines import Coroutine, SyncPoint
from lorica.tune.population.joint_linear import Segment, joint_linear, segment


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
    plain = len(names) == 1 and module.ratio(names[0]) is None and module.shift(names[0]) is None
    return segment(x, *module.update_of(names[0])) if plain else None


def _serve(
    module: nn.Module, weight: Tensor, bias: Tensor | None, segments: Sequence[Segment]
) -> tuple[Tensor, ...]:
    stored_transposed = isinstance(module, (Conv1D, LoraConv1D))
    dtype = segments[0].x.dtype  # autocast's where that is on; a weight is cast once for all coroutines then
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return joint_linear(segments, weight.t() if stored_transposed else weight, bias)
