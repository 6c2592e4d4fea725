"""Waiting for an event, and not for a time: a slow machine fails no test."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 900.0
"""Seconds after which what a test waits for is taken never to come. No test that passes depends on it."""


def until(condition: Callable[[], T], what: str = "what is waited for", every: float = 0.01) -> T:
    """Wait until something holds, and return what told so.

    Args:
        condition: asked again and again.
        what: named in the error.
        every: seconds between.

    Raises:
        AssertionError: it never held.
    """
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(every)
    return found
