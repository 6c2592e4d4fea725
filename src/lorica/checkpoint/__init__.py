"""Adapters on disk and on the Hub."""

from __future__ import annotations

from lorica.checkpoint.hub import push as push
from lorica.checkpoint.hub import read as read
from lorica.checkpoint.peft import is_adapter as is_adapter
from lorica.checkpoint.peft import write as write
from lorica.checkpoint.peft import write_card as write_card
