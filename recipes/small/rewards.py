"""A reward that can be computed, for the recipe that needs one."""

from __future__ import annotations

from typing import Any


def short_words(completions: list[str], **columns: Any) -> list[float]:
    """The share of an answer's words that have four letters at most."""
    words = [text.split() for text in completions]
    return [sum(len(word) <= 4 for word in each) / max(len(each), 1) for each in words]
