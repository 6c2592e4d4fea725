"""What scripts import from `peft.utils.warning`."""

from __future__ import annotations

from lorica.errors import LoricaWarning as PeftWarning

__all__ = ["PeftWarning"]
