"""What `peft.tuners.tuners_utils` exports and scripts ask isinstance of."""

from __future__ import annotations

from lorica.layers import LoraLayer as BaseTunerLayer
from lorica.peft.tuner import LoraModel as BaseTuner

__all__ = ["BaseTuner", "BaseTunerLayer"]
