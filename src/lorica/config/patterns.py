"""Regular expressions in configurations, and the keys of `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lorica.errors import ConfigError

ENGINES: list[Callable[[re.Pattern[str], str], bool | None]] = []
"""A function that matches expressions in Python's place; None leaves it to Python (see `plugins.bounded`)."""


def full_match(pattern: str, text: str) -> bool:
    """Whether a regular expression matches the whole of a text, as `re.fullmatch` has it.

    Raises:
        ConfigError: it is no regular expression, or none that can be matched in bounded time.
    """
    regex = _compiled(pattern)
    if isinstance(regex, str):
        raise ConfigError(f"{short(pattern)!r} is not a regular expression: {regex}")
    for engine in ENGINES:
        if (found := engine(regex, text)) is not None:
            return found
    return regex.fullmatch(text) is not None


def why_unreadable(pattern: str) -> str | None:
    """The fault of a text that is no regular expression; None of one that is."""
    regex = _compiled(pattern)
    return regex if isinstance(regex, str) else None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str] | str:
    """The compiled expression, or why it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what later versions of Python may read otherwise
            return re.compile(pattern)
    except re.error as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    except (OverflowError, MemoryError):
        return "a number of repetitions in it is too large"


def short(pattern: str) -> str:
    """An expression as messages show it."""
    return pattern if len(pattern) <= 200 else f"{pattern[:200]}..."


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
