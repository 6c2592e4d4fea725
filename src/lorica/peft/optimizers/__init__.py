"""Optimizers made for LoRA."""

from __future__ import annotations

from lorica.peft.optimizers.lorafa import LoraFAOptimizer as LoraFAOptimizer
from lorica.peft.optimizers.lorafa import create_lorafa_optimizer as create_lorafa_optimizer
from lorica.peft.optimizers.loraplus import create_loraplus_optimizer as create_loraplus_optimizer
