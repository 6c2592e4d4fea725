"""Names of `peft.tuners.lora.bnb` that scripts import for `isinstance`."""

from __future__ import annotations

from lorica.layers import LoraQuantized as Linear4bit
from lorica.layers import LoraQuantized as Linear8bitLt

__all__ = ["Linear4bit", "Linear8bitLt"]
