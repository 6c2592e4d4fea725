"""What scripts import from `peft.tuners.lora.model`."""

from __future__ import annotations

from lorica.peft.tuner import LoraModel as LoraModel
from lorica.peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
