"""Results as JSON that every reader takes."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

# Control characters, marks that reverse the direction of writing, halves of characters.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def as_json(value: Any, indent: int | None = 2) -> str:
    """A result's text.

    NaN and infinity, for which JSON has no sign, become null; paths and dates become texts.

    Args:
        value: of mappings, sequences, numbers, texts, dataclasses, paths and dates.
        indent: spaces a level; None puts all on one line.

    Raises:
        TypeError: it holds something else.
    """
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    # JSON lets them stand; a terminal obeys some, and halves of characters cannot be written at all.
    return _STEERING.sub(lambda hit: f"\\u{ord(hit[0]):04x}", text)


def visible(text: str) -> str:
    """A text for a terminal: what would steer it, or turn lines around, is shown in Python's notation.

    Line breaks and tabs stay.
    """
    return _STEERING.sub(lambda hit: hit[0].encode("unicode_escape").decode(), text)


class Visible:
    """A stream for texts that may hold anything: each is made `visible` before it is written.

    Args:
        stream: where they go; whoever writes codes for a terminal on purpose writes there.
    """

    def __init__(self, stream: TextIO) -> None:
        """Keep the stream."""
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        return self.stream.write(visible(text))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's."""
        return getattr(self.stream, name)


def plain(value: Any) -> Any:
    """The same in dictionaries, lists, numbers and texts, as reading `as_json`'s text gives it back."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value
