"""Work in a process of its own, whose peak memory is then the work's."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# What every run imports: most of its seconds before the first step.
_COMMON = ["lorica.train.run", "transformers.trainer", "datasets", "sklearn.metrics", "scipy.stats"]


def apart(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Call something in a fresh process, and wait for it.

    The process holds imported modules and nothing of this one's data; it ends with this one, however that
    ends.

    Args:
        work: a function at the top of a module.
        arguments: what it gets; they and the answer are pickled.
        named: as `arguments`.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(_watched, work, *arguments, **named).result()


def _context() -> BaseContext:
    """One whose processes do not start with this one's memory as theirs, as forked ones would.

    Where there is a fork server, it has imported once what each of them needs.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_COMMON)
    return context


def _watched(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    parent = multiprocessing.parent_process()
    if parent is not None:  # whose parent was killed must not go on in secret
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    return work(*arguments, **named)
