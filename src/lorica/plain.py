"""Results as JSON that every reader takes."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def as_json(value: Any, indent: int | None = 2) -> str:
    """A result's text.

    NaN and infinity, for which JSON has no sign, become null; paths and dates become texts.

    Args:
        value: of mappings, sequences, numbers, texts, dataclasses, paths and dates.
        indent: spaces a level; None puts all on one line.

    Raises:
        TypeError: it holds something else.
    """
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


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
