"""What a user sees while nothing has begun to move yet: what is being done, and for how long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console

from lorica.train.console import duration

EVERY = 10.0
"""Seconds between lines, into a pipe."""


@contextlib.contextmanager
def waiting(console: Console | None, what: str) -> Iterator[None]:
    """Say at once what is being done, and that it is still being done.

    On a terminal the line shows the seconds; into a pipe there is a line now and another every ten seconds.

    Args:
        console: where to say it; None says nothing.
        what: is being done, such as "reading rows.csv".
    """
    if console is None:
        yield
        return
    if not console.is_terminal:
        console.print(what, markup=False, soft_wrap=True)
    began, done = time.monotonic(), threading.Event()
    status = console.status("") if console.is_terminal else None

    def say() -> None:
        while not done.wait(1.0 if status is not None else EVERY):
            line = f"{what} ({duration(time.monotonic() - began)})"
            if status is not None:
                status.update(line)
            else:
                console.print(line, markup=False, soft_wrap=True)

    # A thread, for what takes the time is a library's call that tells nothing.
    clock = threading.Thread(target=say, daemon=True)
    if status is not None:
        status.update(what)
        status.start()
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()
        if status is not None:
            status.stop()
