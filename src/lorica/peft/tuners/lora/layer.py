"""Adapted layers by PEFT's names."""

from __future__ import annotations

from typing import Any

from lorica.layers import LoraAttention as MultiheadAttention
from lorica.layers import LoraConv as Conv1d
from lorica.layers import LoraConv as Conv2d
from lorica.layers import LoraConv as Conv3d
from lorica.layers import LoraEmbedding as Embedding
from lorica.layers import LoraLayer as LoraLayer
from lorica.layers import LoraLinear as Linear
from lorica.layers import LoraOpaque, SavedModule, TrainedTokens
from lorica.layers import LoraParameters as ParamWrapper

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraLayer",
    "MultiheadAttention",
    "ParamWrapper",
    "module_type",
    "quantization_backend",
]

_BACKENDS = {"Linear4bit": "bnb 4bit", "Linear8bitLt": "bnb 8bit"}


def quantization_backend(module: Any) -> str | None:
    """The library that packs the layer's weight, such as ``"bnb 4bit"``; None for a plain weight."""
    return _BACKENDS.get(module.base_class.__name__)


def module_type(module: Any) -> str:
    """PEFT's name of such a layer."""
    if isinstance(module, SavedModule):
        return "ModulesToSaveWrapper"
    if isinstance(module, TrainedTokens):
        return "TrainableTokensLayer"
    if isinstance(module, ParamWrapper):
        return "lora.ParamWrapper"
    if isinstance(module, Embedding):
        return "lora.Embedding"
    if isinstance(module, MultiheadAttention):
        return "lora.MultiheadAttention"
    if isinstance(module, Conv2d):
        return f"lora.Conv{module.base_weight.dim() - 2}d"
    if isinstance(module, LoraOpaque) and quantization_backend(module):
        return f"lora.{module.base_class.__name__}"
    return "lora.Linear"
