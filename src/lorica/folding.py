"""W0 + scale·B·A, the same bits however many threads compute it.

What BLAS rounds a sum to depends on how many rows it is given, and on its threads. So a weight is folded by
blocks of rows that follow from its shape alone, each on one thread; several weights may be folded at a time.

    W0 (stored) ── a block of rows ──▶ float32, in a core's cache ── + scale·B·A ──▶ rounded once ──▶ stored
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from lorica.errors import AdapterError

T = TypeVar("T")

_FOLDED = 1 << 18  # elements that `fold` takes at once


def fold(weight: Tensor, left: Tensor, right: Tensor, scale: float, *, out: Tensor | None = None) -> Tensor:
    """``weight + scale · left·right``, on the CPU by blocks of rows; computed in the factors' dtype.

    Args:
        weight: (rows, columns).
        left: (rows, r).
        right: (r, columns).
        scale: factor of the product.
        out: (rows, columns) tensor of any dtype to write to, rounded once; may be `weight` itself.

    Returns:
        The sum; `out` if it was given, else in the factors' dtype. No gradient passes through.
    """
    result = torch.empty_like(weight, dtype=left.dtype) if out is None else out
    rows = fold_rows(weight.shape[1]) if weight.device.type == "cpu" else max(weight.shape[0], 1)
    direct = weight.dtype == left.dtype == result.dtype
    with torch.no_grad():
        work = (
            None if direct else weight.new_empty((min(rows, len(weight)), weight.shape[1]), dtype=left.dtype)
        )
        for values, factor, stored in zip(*(t.split(rows) for t in (weight, left, result)), strict=True):
            if work is None:
                torch.addmm(values, factor, right, alpha=scale, out=stored)
            else:
                stored.copy_(work[: len(values)].copy_(values).addmm_(factor, right, alpha=scale))
    return result


def fold_rows(columns: int) -> int:
    """Rows of a block of `fold`: a megabyte of float32, for a core's cache; a multiple of sixteen."""
    return max(_FOLDED // max(columns, 1) // 16 * 16, 16)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on one CPU thread; for sums that must come out the same on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each_on_one_thread(work: Callable[[T], object], items: Iterable[T], *, at_once: bool = True) -> None:
    """Call `work` on every item, each call on one CPU thread, and as many at a time as torch has threads.

    Args:
        work: what to do; raises to stop.
        items: what to do it on; each writes to memory of its own.
        at_once: False does them in turn on the caller's thread, and so on its own stream of a GPU.
    """
    helpers = torch.get_num_threads() - 1 if at_once else 0
    inference = torch.is_inference_mode_enabled()  # holds for the thread that entered it, not for others
    waiting = iter(list(items))

    def drain() -> None:
        torch.set_num_threads(1)  # reaches the calling thread's arithmetic, not that of others
        with torch.inference_mode(inference):
            for item in waiting:
                work(item)

    # Helpers end with the call: none is left idle, or for a `fork` to lose.
    with one_thread(), ThreadPoolExecutor(max(helpers, 1)) as pool:
        helping = [pool.submit(drain) for _ in range(helpers)]
        drain()
        for helper in helping:
            helper.result()


def check_finite(path: str, leaf: str, merged: Tensor) -> None:
    """Refuse a merged parameter that holds NaN or infinity; the caller then leaves the model as it was."""
    # A sum is finite only if all its terms are, and much cheaper than a check of each.
    if not math.isfinite(merged.detach().sum().item()) and not merged.isfinite().all():
        raise AdapterError(
            f"{path}: the merged {leaf} would hold NaN or infinity in {merged.dtype}; the model "
            "is left as it was"
        )
