"""Which rows go together: those of about one length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

ROWS = 8
"""Rows of a batch. On a CPU more rows are more arithmetic and more padding, and no less time a row."""
WASTE = 0.2
"""Share of a batch's tokens that may be padding."""


def batches(lengths: Sequence[int], *, rows: int = ROWS, waste: float = WASTE) -> list[list[int]]:
    """Cut rows into batches.

    Args:
        lengths: tokens of each row.
        rows: the most of a batch.
        waste: the largest share of padding.

    Returns:
        Indices of the rows of each batch, the short rows first.
    """
    result: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        batch = result[-1] if result else []
        padded = (len(batch) + 1) * lengths[i]  # in this order the newest row is the longest
        if not batch or len(batch) == rows or padded - tokens - lengths[i] > waste * padded:
            result.append([i])
            tokens = lengths[i]
        else:
            batch.append(i)
            tokens += lengths[i]
    return result
