"""Keys of `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorica.config.matching import full_match


def first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that speaks of the module at `path`; `default` if none does."""
    for key, value in patterns.items():
        if matches_pattern(key, path):
            return value
    return default


def matches_pattern(key: str, path: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` speaks of the module at `path`."""
    return full_match(with_prefix(key), path)


def exactly(path: str) -> str:
    """The key that speaks of the module at `path` alone; not of one whose path ends so."""
    return f"^{re.escape(path)}"


def with_prefix(key: str) -> str:
    """The regular expression that a key stands for: it may be the end of a path, from a dot on."""
    return rf"(.*\.)?({key})"
