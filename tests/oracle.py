"""The judge of every fast path: the update as the paper writes it, with no thought for speed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.layers import LoraLayer

M = TypeVar("M", bound=nn.Module)


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, keep: Tensor | None = None
) -> Tensor:
    """``W·x + b + scale·B·A·x̃``; x̃ is x times `keep`, a dropout mask already divided by the rate kept."""
    dropped = x if keep is None else x * keep
    y = x @ W.T + scale * (dropped @ A.to(x.dtype).T @ B.to(x.dtype).T)
    return y if bias is None else y + bias


def delta(layer: LoraLayer, name: str) -> Tensor:
    """``scale·B·A`` of an adapter in the layout of the layer's own weight."""
    A, B = (factor.detach() for factor in layer.factor_parameters(name))
    update = layer.scaling[name] * torch.einsum("or,ri->oi", B.flatten(1), A.flatten(1))
    weight = layer.base_weight
    stored_in_first = isinstance(layer, nn.Embedding) or type(layer).__name__.endswith("Conv1D")
    return (update.T if stored_in_first else update).reshape(weight.shape)


def folded(model: M, before: M, names: Iterable[str] = ("default",)) -> M:
    """A copy of the base as it was `before`, its weights W0 + Σ scale·B·A of adapters of `model`."""
    reference = copy.deepcopy(before)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert layers, "nothing is adapted: the comparison would prove nothing"
    with torch.no_grad():
        for path, layer in layers.items():
            weight = reference.get_parameter(f"{path}.{layer.weight_name}" if path else layer.weight_name)
            for name in names:
                if name in layer.scaling:
                    weight.add_(delta(layer, name))
    return reference


def randomise(model: M, std: float = 0.3) -> M:
    """Draw every A and B afresh, so that each update changes what the model computes."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for name in layer.scaling:
                    for factor in layer.factor_parameters(name):
                        factor.normal_(0, std)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients there are, by parameter name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def parameter(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Parameter:
    """A trainable tensor of normal draws."""
    return Parameter(torch.randn(*shape, dtype=torch.float64).mul(std).to(dtype))
