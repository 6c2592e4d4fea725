"""Merging into quantized layers: into packed weights again, or into plain layers that replace them.

    quantized      unpack W0 ─▶ W0 + s·B·A ─▶ pack with the same settings      as small as before; loses much
    dequantized    unpack W0 ─▶ W0 + s·B·A ─▶ a plain nn.Linear                exact; as large as the original

Neither equals a merge into the original weights: the adapter was trained beside the quantized W0, and makes
up for some of what quantizing lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from lorica.check import check_replaceable
from lorica.errors import ConfigError, StateError, listing
from lorica.layers.quantized import dequantize, quantizer_of
from lorica.model.merging.steps import PACKED, Into, Packed
from lorica.tree import base_parameters, module_at, walk

# Attributes that transformers sets on a quantized model, and reads when it saves one.
_NOTES = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def packed_layers(root: nn.Module) -> dict[str, nn.Module]:
    """Path → module with a packed weight that lorica can read, adapted or not."""
    return {place.path: place.module for place in walk(root) if quantizer_of(place.module) is not None}


def plain_dtype(root: nn.Module) -> torch.dtype:
    """The dtype of activations in a quantized model: that of most of its plain parameters."""
    sizes: Counter[torch.dtype] = Counter()
    packed = packed_layers(root)
    for name, parameter in base_parameters(root).items():
        if name.rpartition(".")[0] not in packed and parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


@dataclass(eq=False)
class _Layer:
    """A packed layer's class, its parameters, and the attributes that hid them."""

    module: nn.Module
    cls: type[nn.Module]
    parameters: dict[str, Parameter | None]
    hiding: dict[str, Any]


class PackedLayers(Packed):
    """The quantized layers of a model during a merge.

    Args:
        root: the model.
        layers: path → layer with a packed weight that lorica can read, adapted or not.
        into: what they become.

    Attributes:
        unpacked: the layers that became plain.
        notes: attributes of transformers that were removed from the model.
        declared: the `quantization_config` of its configuration.
    """

    def __init__(self, root: nn.Module, layers: dict[str, nn.Module], into: Into) -> None:
        self.layers, self.into = layers, into
        self.plain = plain_dtype(root) if into == "dequantized" else None
        self.weights: dict[str, Parameter] = {}
        self.unpacked: list[_Layer] = []
        self.notes: dict[str, Any] = {}
        self.declared: Any = None

    def take(self, merged: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the plain weights: the merged one where there is one, otherwise W0.

        Raises:
            TargetError: a layer's forward was replaced on the module itself.
        """
        if self.plain is None:
            return
        for path, module in self.layers.items():
            check_replaceable(path, module)
        self.weights = {
            path: merged[path]["weight"]
            if path in merged
            else Parameter(dequantize(module).to(self.plain), requires_grad=False)
            for path, module in self.layers.items()
        }

    def do(self, root: nn.Module) -> None:
        """Make them plain `nn.Linear`s in place; a transformers model forgets that it was quantized."""
        if not self.weights:
            return
        for path, weight in self.weights.items():
            module = module_at(root, path)
            bias = getattr(module, "bias", None)
            hiding = {
                name: module.__dict__.pop(name) for name in ("weight", "bias") if name in module.__dict__
            }
            self.unpacked.append(_Layer(module, type(module), dict(module._parameters), hiding))
            module.__class__ = nn.Linear
            if bias is not None and (bias.dtype != weight.dtype or not isinstance(bias, Parameter)):
                bias = Parameter(bias.detach().to(weight.dtype), requires_grad=False)
            module._parameters.update(weight=weight, bias=bias)
        self.notes = {name: root.__dict__.pop(name) for name in _NOTES if name in root.__dict__}
        config = getattr(getattr(root, "config", None), "__dict__", {})
        self.declared = config.pop("quantization_config", None)

    def undo(self, root: nn.Module) -> None:
        """Make them packed again; the packed weights are the same memory as before."""
        for layer in self.unpacked:
            layer.module.__class__ = layer.cls
            layer.module._parameters.clear()
            layer.module._parameters.update(layer.parameters)
            layer.module.__dict__.update(layer.hiding)
        root.__dict__.update(self.notes)
        if self.declared is not None:
            root.config.quantization_config = self.declared  # type: ignore[union-attr]


def look(root: nn.Module, into: Into | None, updated: list[str]) -> PackedLayers | None:
    """A model's packed layers, after a choice of what becomes of them; None where there are none.

    Args:
        root: the model.
        into: the caller's choice.
        updated: paths of those that take an update.

    Raises:
        ConfigError: the choice has another value.
        StateError: a choice is necessary and missing.
    """
    if into not in (None, "quantized", "dequantized"):
        raise ConfigError(f'into must be "quantized" or "dequantized", not {into!r}')
    if updated and into is None:
        raise StateError(
            f"the weights of {listing(updated, limit=3)} are quantized; say what to merge into: "
            'into="quantized" packs W0 + scale·B·A again, which rounds much of the update away, and '
            'into="dequantized" makes them plain layers, exact and as large as before they were quantized. '
            "To merge into the original weights, use `lorica merge BASE ADAPTER --output DIR`"
        )
    layers = packed_layers(root)
    return PackedLayers(root, layers, into) if layers and into is not None else None


PACKED.append(look)
