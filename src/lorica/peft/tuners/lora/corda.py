"""What scripts import from `peft.tuners.lora.corda`."""

from __future__ import annotations

from lorica.peft.starts import preprocess_corda as preprocess_corda
