"""Names of `peft.utils.error` that scripts import."""

from __future__ import annotations

from lorica.errors import LoricaError as PeftError
from lorica.errors import TargetError as NoMatchingPeftModuleError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]
