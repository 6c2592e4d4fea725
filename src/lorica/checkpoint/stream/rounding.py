"""Warn before a merge if the stored dtype is too coarse for the adapter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lorica.checkpoint.stream.blocks import Buffers, Reader
from lorica.checkpoint.stream.plan import Plan
from lorica.checkpoint.stream.shards import DTYPES, short
from lorica.errors import LoricaWarning

_EATEN = 0.2  # share of the update lost to rounding from which on a merge is worth a warning
_SAMPLE = 1 << 16  # elements of each layer that are looked at
_COARSE = (torch.bfloat16, torch.float16)


class Loss(NamedTuple):
    """The rounding error on a sample of a layer, in squares, so that layers add up."""

    label: str
    stored: torch.dtype
    update: float
    lost: dict[torch.dtype, float]


def warn_of_rounding(plan: Plan) -> None:
    """Warn, before the work is done, if storing the sums would lose a good part of the update.

    A weight in bfloat16 has eight bits; an update a thousandth of its size changes few of them. The loss in
    float16 is measured on the same sample.
    """
    layers = [loss for loss in _losses(plan) if loss.update]
    for dtype in _COARSE:
        found = [loss for loss in layers if loss.stored == dtype]
        total = sum(loss.update for loss in found)
        if not total:
            continue
        share, half = (
            (sum(loss.lost[kept] for loss in found) / total) ** 0.5 for kept in (dtype, torch.float16)
        )
        if not _EATEN <= share < math.inf:  # an overflow is refused when it is written
            continue
        worst = max(found, key=lambda loss: loss.lost[dtype] / loss.update)
        most = (worst.lost[dtype] / worst.update) ** 0.5
        float16 = f"float16 would lose {half:.1%}, " if half < share else ""
        warnings.warn(
            f"stored as {short(dtype)}, rounding takes about {share:.0%} of the update ({most:.0%} of that "
            f"of {worst.label}), so small is it beside the weights; {float16}float32 would lose next to "
            "nothing. Choose another dtype, or keep the adapter apart",
            LoricaWarning,
            stacklevel=4,
        )


def _losses(plan: Plan) -> Iterator[Loss]:
    buffers = Buffers()
    for shard, piece in plan.updated:
        stored = DTYPES[piece.dtype]
        if stored not in _COARSE:
            continue
        columns = torch.Size(piece.shape[1:]).numel()
        with shard.base.path.open("rb", buffering=0) as file:
            for update in piece.updates:
                rows = min(max(_SAMPLE // columns, 1), update.stop - update.start)
                raw = Reader(file, buffers).read(piece, update.start * columns, rows * columns)
                W0 = raw.float().view(rows, columns)
                left, right = update.product(torch.float32)
                delta = update.factors.scale * (left[:rows] @ right)
                exact = W0 + delta
                lost = {kept: float((exact.to(kept) - exact).square().sum()) for kept in _COARSE}
                yield Loss(update.label, stored, float(delta.square().sum()), lost)
