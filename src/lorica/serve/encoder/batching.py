"""Batches of rows of about one length, so that little of them is padding."""

from __future__ import annotations

from collections.abc import Sequence

ROWS = 8
"""Rows of a batch, unless they are so short that more have at most `TOKENS` tokens together."""
TOKENS = 256
"""Tokens from which a CPU's products are as fast as they get; more rows are then no less time a row."""
WASTE = 0.2
"""Share of a batch's tokens that may be padding."""


def batches(
    lengths: Sequence[int], *, rows: int = ROWS, tokens: int = TOKENS, waste: float = WASTE
) -> list[list[int]]:
    """Cut rows into batches.

    Args:
        lengths: tokens of each row.
        rows: the most of a batch with more tokens than `tokens`.
        tokens: of a batch with more rows, padding and all.
        waste: the largest share of padding.

    Returns:
        Indices of the rows of each batch, the short rows first.
    """
    result: list[list[int]] = []
    held = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        batch = result[-1] if result else []
        padded = (len(batch) + 1) * lengths[i]  # in this order the newest row is the longest
        full = len(batch) >= rows and padded > tokens
        if not batch or full or padded - held - lengths[i] > waste * padded:
            result.append([i])
            held = lengths[i]
        else:
            batch.append(i)
            held += lengths[i]
    return result
