"""Work shared among threads that compute alone each: torch's own would change what is rounded to."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch


def share(work: Callable[[range], None], items: range) -> None:
    """Do some independent work, on as many threads as torch has at this moment.

    Args:
        work: called with a part of `items`, several times at once; inside it torch has one thread.
        items: what there is to do.
    """
    count = min(torch.get_num_threads(), len(items))
    if count <= 1:
        with alone():
            work(items)
        return
    pool = _pool(os.getpid(), torch.get_num_threads())
    for part in [pool.submit(work, items[k::count]) for k in range(count)]:
        part.result()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Have torch compute on the calling thread alone."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """Threads on which torch computes alone. A forked process has none of its parent's, and needs its own."""
    before, started = torch.get_num_threads(), Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # on its first call in a thread torch overrides what was set there
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, f"lorica-{process}", initializer=start)
    for _ in range(count):
        pool.submit(lambda: None)
    started.wait()
    torch.set_num_threads(before)  # threads that are yet to come take theirs from whoever set it last
    return pool
