"""Names of `peft.utils.warning` that scripts import."""

from __future__ import annotations

from lorica.errors import LoricaWarning as PeftWarning

__all__ = ["PeftWarning"]
