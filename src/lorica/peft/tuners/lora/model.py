"""What scripts import from `peft.tuners.lora.model`."""

from __future__ import annotations

from lorica.peft.tuner import LoraModel as LoraModel
