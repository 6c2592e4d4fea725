"""What scripts import from `peft.tuners.lora.layer`."""

from __future__ import annotations

from lorica.layers import LoraAttention as MultiheadAttention
from lorica.layers import LoraConv as Conv1d
from lorica.layers import LoraConv as Conv2d
from lorica.layers import LoraConv as Conv3d
from lorica.layers import LoraEmbedding as Embedding
from lorica.layers import LoraLayer as LoraLayer
from lorica.layers import LoraLinear as Linear
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
]
