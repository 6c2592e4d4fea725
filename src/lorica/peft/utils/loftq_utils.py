"""What scripts import from `peft.utils.loftq_utils`."""

from __future__ import annotations

from lorica.peft.starts import replace_lora_weights_loftq as replace_lora_weights_loftq
