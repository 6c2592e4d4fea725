"""Adapters on disk and on the Hub. Names are imported on first use, as in `lorica`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorica import names_of

if TYPE_CHECKING:
    from lorica.checkpoint.hub import push as push
    from lorica.checkpoint.hub import read as read
    from lorica.checkpoint.peft import is_adapter as is_adapter
    from lorica.checkpoint.peft import write as write
    from lorica.checkpoint.peft import write_card as write_card

__getattr__ = names_of(__name__, {"hub": "push read", "peft": "is_adapter write write_card"})
