"""Names of `peft.utils.peft_types` that scripts import."""

from __future__ import annotations

from lorica.peft.config import PeftType as PeftType
from lorica.peft.config import TaskType as TaskType
