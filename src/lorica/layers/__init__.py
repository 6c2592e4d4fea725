"""Adapted layers: what a module becomes, and those of a model by their paths."""

from __future__ import annotations

from torch import nn

# The kinds of layers register themselves, in the order in which they are asked what a module becomes.
# isort: off
from lorica.layers.base import LoraLayer as LoraLayer
from lorica.layers.linear import LoraConv1D as LoraConv1D
from lorica.layers.linear import LoraLinear as LoraLinear
from lorica.layers.plugins.attention import LoraAttention as LoraAttention
from lorica.layers.plugins.attention import LoraAttentionOutput as LoraAttentionOutput
from lorica.layers.plugins.attention import LoraReadLinear as LoraReadLinear
from lorica.layers.plugins.opaque import LoraOpaque as LoraOpaque
from lorica.layers.plugins.conv import LoraConv as LoraConv
from lorica.layers.plugins.embedding import LoraEmbedding as LoraEmbedding
from lorica.layers.quantized import LoraQuantized as LoraQuantized
from lorica.layers.plugins.read import ReadWeight as ReadWeight
from lorica.layers.plugins.read import Uncalled as Uncalled

# isort: on
from lorica.layers.plugins.added import AddedModule as AddedModule
from lorica.layers.plugins.added import Part as Part
from lorica.layers.plugins.added import Plan as Plan
from lorica.layers.plugins.biased import BIASED as BIASED
from lorica.layers.plugins.dora import DORA as DORA
from lorica.layers.plugins.ecosystem import AskedModule as AskedModule
from lorica.layers.plugins.experts import LoraParameters as LoraParameters
from lorica.layers.plugins.offloaded import OffloadedFactor as OffloadedFactor
from lorica.layers.plugins.reading import reading_of as reading_of
from lorica.layers.plugins.tied import TiedFactor as TiedFactor
from lorica.layers.plugins.tied import tie_factors as tie_factors
from lorica.layers.plugins.tied import tied_factors as tied_factors
from lorica.layers.plugins.tokens import TrainedTokens as TrainedTokens
from lorica.layers.saved import SavedModule as SavedModule
from lorica.layers.saved import read_by as read_by
from lorica.layers.swapped import LayerState as LayerState
from lorica.layers.swapped import SwappedModule as SwappedModule
from lorica.layers.swapped import swapped_class as swapped_class
from lorica.tree import walk as walk


def lora_layers(root: nn.Module) -> dict[str, LoraLayer]:
    """Path → adapted layer."""
    return {place.path: place.module for place in walk(root) if isinstance(place.module, LoraLayer)}


def saved_modules(root: nn.Module) -> dict[str, SavedModule]:
    """Path → module with a copy trained whole."""
    return {place.path: place.module for place in walk(root) if isinstance(place.module, SavedModule)}
