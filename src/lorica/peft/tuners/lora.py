"""What `peft.tuners.lora` exports and scripts import from there."""

from __future__ import annotations

from lorica.layers import LoraEmbedding as Embedding
from lorica.layers import LoraLayer as LoraLayer
from lorica.layers import LoraLinear as Linear
from lorica.peft.config import LoraConfig as LoraConfig
from lorica.peft.config import LoraRuntimeConfig as LoraRuntimeConfig
from lorica.peft.tuner import LoraModel as LoraModel

__all__ = ["Embedding", "Linear", "LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig"]
