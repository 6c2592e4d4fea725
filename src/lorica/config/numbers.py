"""What counts as a number in a configuration: one that a float32 can hold, and that is no truth value."""

from __future__ import annotations

from typing import Any

_LARGEST_INT = 2**31 - 1
_LARGEST = 1e30
"""Scales are multiplied with float32 numbers; beyond this nothing but infinity comes out."""


def is_number(value: Any) -> bool:
    """Whether it is a finite number of a size that can be computed with."""
    # An int of any size compares; NaN compares as False.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def is_index(value: Any) -> bool:
    """Whether it is a whole number that counts from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_INT


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least 1."""
    return is_index(value) and value >= 1
