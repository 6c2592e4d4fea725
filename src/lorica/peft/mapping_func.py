"""What scripts import from `peft.mapping_func`."""

from __future__ import annotations

from lorica.peft.mapping import get_peft_model as get_peft_model
