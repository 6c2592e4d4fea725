"""Adapted layers, and which module becomes which."""

from __future__ import annotations

import sys

import torch
from torch import nn

from lorica.layers.added import AddedModule as AddedModule
from lorica.layers.added import Part as Part
from lorica.layers.added import Plan as Plan
from lorica.layers.base import LoraLayer as LoraLayer
from lorica.layers.conv import LoraConv as LoraConv
from lorica.layers.ecosystem import AskedModule as AskedModule
from lorica.layers.embedding import LoraEmbedding as LoraEmbedding
from lorica.layers.experts import LoraParameters as LoraParameters
from lorica.layers.linear import LoraAttention as LoraAttention
from lorica.layers.linear import LoraAttentionOutput as LoraAttentionOutput
from lorica.layers.linear import LoraConv1D as LoraConv1D
from lorica.layers.linear import LoraLinear as LoraLinear
from lorica.layers.linear import LoraReadLinear as LoraReadLinear
from lorica.layers.opaque import LoraOpaque as LoraOpaque
from lorica.layers.opaque import is_linear_like
from lorica.layers.quantized import LoraQuantized as LoraQuantized
from lorica.layers.quantized import quantizer_of
from lorica.layers.read import LoraOwnConv, LoraOwnLinear, read_kind, returns_other
from lorica.layers.read import ReadWeight as ReadWeight
from lorica.layers.read import Uncalled as Uncalled
from lorica.layers.reading import reading_of as reading_of
from lorica.layers.saved import SavedModule as SavedModule
from lorica.layers.saved import read_by as read_by
from lorica.layers.swapped import LayerState as LayerState
from lorica.layers.swapped import SwappedModule as SwappedModule
from lorica.layers.swapped import swapped_class as swapped_class
from lorica.layers.tied import TiedFactor as TiedFactor
from lorica.layers.tied import tie_factors as tie_factors
from lorica.layers.tied import tied_factors as tied_factors
from lorica.layers.tokens import TrainedTokens as TrainedTokens

ADAPTABLE = (
    "nn.Linear and its subclasses, quantized layers, transformers' Conv1D, nn.Embedding, nn.Conv1d/2d/3d, "
    "nn.MultiheadAttention"
)


def layer_class(module: nn.Module, parent: nn.Module | None = None) -> type[LoraLayer] | None:
    """The kind of adapted layer that a module becomes, or None where it cannot be adapted.

    Args:
        module: the module; one already adapted gives its kind.
        parent: the module that holds it, which may read its weight without calling it.
    """
    if isinstance(module, LoraLayer):
        return module.swapped_by  # pyright: ignore[reportReturnType]
    layer = _kind(module, parent)
    if layer is None:
        return None
    reading = reading_of(module, parent)
    return read_kind(layer, module, called=reading.called) if reading.read else layer


def _kind(module: nn.Module, parent: nn.Module | None) -> type[LoraLayer] | None:
    """The kind of layer, whatever the code around the module reads of it."""
    if isinstance(module, nn.MultiheadAttention):
        return LoraAttention
    if quantizer_of(module) is not None and not isinstance(module, nn.Embedding):
        return LoraQuantized
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward and _is_plain(module.weight)
        if not plain:
            return LoraOwnLinear if returns_other(module) else LoraOpaque
        if isinstance(parent, nn.MultiheadAttention):
            return LoraAttentionOutput
        return LoraReadLinear if isinstance(parent, nn.TransformerEncoderLayer) else LoraLinear
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return LoraOwnConv if returns_other(module) else LoraConv
    # A Conv1D can only be there if its module was imported; importing transformers to find out would cost
    # seconds.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    if pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D):
        own_forward = type(module).forward is not pytorch_utils.Conv1D.forward
        return None if own_forward else LoraConv1D
    if not is_linear_like(module):
        return None
    return LoraOwnLinear if returns_other(module) else LoraOpaque


def _is_plain(weight: torch.Tensor) -> bool:
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point()
