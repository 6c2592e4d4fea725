"""Adapters on disk."""

from __future__ import annotations

from lorica.checkpoint.peft import is_adapter as is_adapter
from lorica.checkpoint.peft import read as read
from lorica.checkpoint.peft import write as write
from lorica.checkpoint.peft import write_card as write_card
