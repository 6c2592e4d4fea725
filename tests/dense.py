"""The judge of several adapters at once: what each alone makes of the base's weights, added up.

W0 + Σ (Wᵢ − W0)      Wᵢ: W0 + s·B·A, for DoRA its rows at their trained magnitudes, for a start that was
                      taken out of W0 the rest with the trained product; trained copies as they are
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import oracle
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter

import lorica
from lorica.layers import LoraLayer
from lorica.pieces.copies import ParameterCopy
from lorica.pieces.whole import copies_of
from lorica.state import AdapterState
from lorica.state import adapted as roster_of

TAKEN_OUT = ("pissa", "olora", "loftq")
"""Starts that leave another weight than W0 beside A and B."""


def slots_of(state: AdapterState, name: str) -> dict[str, Parameter]:
    """Name of a parameter of the base → the adapter's trained copy of it."""
    return {p.path: p.parameter for p in state.pieces[name] if isinstance(p, ParameterCopy)}


class Dense:
    """The judge: what each adapter alone makes of every parameter of the base."""

    def __init__(self, model: nn.Module) -> None:
        self.base = copy.deepcopy(model)
        self.rests: dict[tuple[str, str], Tensor] = {}

    def noticed(self, model: nn.Module, name: str) -> None:
        """Note what an adapter's start, which acts alone and untrained, leaves of W0."""
        config = lorica.adapters(model)[name]
        if not isinstance(config, lorica.LoraConfig) or str(config.init_lora_weights) not in TAKEN_OUT:
            return
        for path, layer in layers_of(model, name):
            full = f"{path}.{layer.weight_name}"
            if config.init_lora_weights == "loftq":  # W0 quantized: no difference of two matrices
                self.rests[name, full] = layer.base_weight.detach().clone()
            else:
                start = oracle.delta(layer, name).detach()
                self.rests[name, full] = self.base.get_parameter(full).detach() - start

    def parameters(self, model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """The base's parameters with all that the named adapters make of them."""
        own = dict(self.base.named_parameters())
        result: dict[str, Tensor] = {**own}
        _, state = roster_of(model)
        for name in names:
            for path, slot in slots_of(state, name).items():
                result[path] = result[path] + (slot - own[path])
            for twin in copies_of(state, name):
                result[twin.key] = twin.tensor
            for path, layer in layers_of(model, name):
                full = f"{path}.{layer.weight_name}"
                made = self.rests.get((name, full), own[full]) + oracle.delta(layer, name)
                magnitude = layer.magnitude_parameter(name)
                if magnitude is not None:
                    made = _turned(layer, made, magnitude)
                result[full] = result[full] + (made - own[full])
                bias = layer.bias_parameter(name)
                if bias is not None:
                    result[f"{path}.bias"] = result[f"{path}.bias"] + layer.scaling[name] * bias
        return result

    def __call__(self, model: nn.Module, *args: Any, names: Sequence[str], **kwargs: Any) -> Any:
        """The base's output with those parameters."""
        return functional_call(self.base, self.parameters(model, names), args, kwargs)


def _turned(layer: LoraLayer, weight: Tensor, magnitude: Tensor) -> Tensor:
    """Rows, one for each output, brought to their magnitudes; the norm is taken as a constant."""
    by_columns = isinstance(layer, nn.Embedding) or "Conv1D" in type(layer).__name__
    matrix = weight.mT if by_columns else weight.flatten(1)
    turned = magnitude[:, None] * matrix / matrix.norm(dim=1, keepdim=True).detach()
    return turned.mT if by_columns else turned.view(weight.shape)


def layers_of(model: nn.Module, name: str) -> list[tuple[str, LoraLayer]]:
    return [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.scaling
    ]
