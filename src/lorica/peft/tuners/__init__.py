"""What `peft.tuners` exports and scripts import from there."""

from __future__ import annotations

from lorica.peft.tuners.lora import LoraConfig as LoraConfig
from lorica.peft.tuners.lora import LoraModel as LoraModel
