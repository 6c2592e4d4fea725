"""What scripts import from `peft.tuners.lora.eva`."""

from __future__ import annotations

from lorica.peft.starts import forward_fn_dict as forward_fn_dict
from lorica.peft.starts import get_eva_state_dict as get_eva_state_dict
from lorica.peft.starts import initialize_lora_eva_weights as initialize_lora_eva_weights
