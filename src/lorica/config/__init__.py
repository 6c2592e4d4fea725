"""What to train: the configuration, in PEFT's own field names and JSON."""

from __future__ import annotations

from lorica.config.checks import BIASES as BIASES
from lorica.config.checks import INITS as INITS
from lorica.config.checks import TASK_TYPES as TASK_TYPES
from lorica.config.lora import LoraConfig as LoraConfig
from lorica.config.patterns import matches_pattern as matches_pattern
