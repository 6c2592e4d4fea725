"""The judge of every fast path: the update as the paper writes it, with no thought for speed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import lorica
from lorica import Factors, LoraConfig
from lorica.layers import LoraLayer, LoraParameters


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, keep: Tensor | None = None
) -> Tensor:
    """``W·x + b + scale·B·A·x̃``; x̃ is x times `keep`, a dropout mask already divided by the rate kept."""
    dropped = x if keep is None else x * keep
    y = x @ W.T + scale * (dropped @ A.to(x.dtype).T @ B.to(x.dtype).T)
    return y if bias is None else y + bias


def update(factors: Factors) -> Tensor:
    """``scale·B·A`` of one module, in float64: (d_out, ...) with all of the inputs' dimensions."""
    A, B = factors.A.double(), factors.B.double().flatten(1)
    rows, shared = [], B.shape[1]
    for i, row in enumerate(B):
        group = i * (A.shape[0] // shared) // len(B)
        own = A[group * shared : (group + 1) * shared]
        rows.append(sum(row[j] * own[j] for j in range(shared)))
    return factors.scale * torch.stack(rows)


def delta(layer: LoraLayer, name: str) -> Tensor:
    """``scale·B·A`` of an adapter in the layout of the layer's own weight; differentiable."""
    A, B = layer.factor_parameters(name)
    update = layer.scaling[name] * torch.einsum("or,ri->oi", B.flatten(1), A.flatten(1))
    stored_in_first = isinstance(layer, nn.Embedding) or "Conv1D" in type(layer).__name__
    return (update.T if stored_in_first else update).reshape(layer.base_weight.shape)


def stacked(layer: LoraParameters, update: Any, name: str, W0: Tensor) -> Tensor:
    """The update of a parameter, an expert after the other; of a plain matrix there is one."""
    A, B = update.factor_parameters(name)
    experts = W0.shape[0] if W0.dim() == 3 else 1
    r = A.shape[0] // experts
    products = [B[:, e::experts] @ A[e * r : (e + 1) * r] for e in range(experts)]
    if W0.dim() == 2:
        return update.scaling[name] * products[0]
    matrices = [p.T if getattr(layer, "is_transposed", False) else p for p in products]
    return update.scaling[name] * torch.stack(matrices)


def folded(model: nn.Module, before: nn.Module, names: Iterable[str] = ("default",)) -> dict[str, Tensor]:
    """W0 + Σ scale·B·A of adapters of `model`, by name of the weight in the base as it was `before`."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert layers, "nothing is adapted: the comparison would prove nothing"
    weights: dict[str, Tensor] = {}
    for path, layer in layers.items():
        if isinstance(layer, LoraParameters):
            for leaf, update in layer.lora_parameters.items():
                W0 = before.get_parameter(f"{path}.{leaf}")
                weights[f"{path}.{leaf}"] = W0 + sum(stacked(layer, update, n, W0) for n in names)
            continue
        full = f"{path}.{layer.weight_name}" if path else layer.weight_name
        updates = [delta(layer, name) for name in names if name in layer.scaling]
        weights[full] = sum(updates, start=before.get_parameter(full))  # pyright: ignore[reportArgumentType]
    return weights


def assert_as_folded(
    model: nn.Module, before: nn.Module, *args: Any, names: Iterable[str] = ("default",), **kwargs: Any
) -> Tensor:
    """The model computes, and has the gradients, of the base whose weights hold W0 + Σ scale·B·A.

    Returns:
        The output.
    """
    inputs = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
    factors = [
        p for n, p in model.named_parameters() if "lora_" in n and any(f".{name}" in n for name in names)
    ]
    asked = [*inputs, *factors]
    y = _first(model(*args, **kwargs))
    expected = _first(functional_call(before, folded(model, before, names), args, kwargs))
    base = _first(before(*args, **kwargs))
    assert not torch.allclose(expected, base, atol=1e-2), (
        "the update does nothing: the comparison would prove nothing"
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    if y.requires_grad:
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        got = torch.autograd.grad(y, asked, weights)
        torch.testing.assert_close(got, torch.autograd.grad(expected, asked, weights), rtol=1e-3, atol=1e-4)
    return y


def _first(output: Any) -> Tensor:
    """The tensor of an output; attention returns it with its weights."""
    return output[0] if isinstance(output, tuple) else output


def adapted(base: nn.Module, *targets: str, name: str = "default", **settings: Any) -> tuple[Any, Any]:
    """The base with one more adapter that is not zero, and a copy of what it was before."""
    before = copy.deepcopy(base)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": list(targets), **settings}
    lorica.adapt(base, LoraConfig(**fields), name, seed=len(lorica.adapters(base)))
    with torch.no_grad():
        for layer in base.modules():
            if isinstance(layer, LoraLayer) and name in layer.scaling:
                for factor in layer.factor_parameters(name):
                    factor.normal_(0, 0.3)
    return base, before
