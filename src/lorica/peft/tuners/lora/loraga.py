"""What scripts import from `peft.tuners.lora.loraga`."""

from __future__ import annotations

from lorica.peft.starts import preprocess_loraga as preprocess_loraga
