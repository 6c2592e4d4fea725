"""Names of `peft.tuners.lora.config` that scripts import."""

from __future__ import annotations

from lorica.config import CordaConfig as CordaConfig
from lorica.config import EvaConfig as EvaConfig
from lorica.config import LoftQConfig as LoftQConfig
from lorica.config import LoraGAConfig as LoraGAConfig
from lorica.peft.config import LoraConfig as LoraConfig
from lorica.peft.config import LoraRuntimeConfig as LoraRuntimeConfig
