"""What scripts import from `peft.utils.peft_types`."""

from __future__ import annotations

from lorica.peft.config import PeftType as PeftType
from lorica.peft.config import TaskType as TaskType
