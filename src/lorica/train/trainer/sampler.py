"""Batches of rows of similar lengths, drawn so that a run can be taken up anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Draws rows at random, then sorts each stretch of fifty batches by length: little padding, still random.

    The order depends on the seed and the epoch alone, and not, as transformers' own, on torch's global
    generator; after a resume the same rows follow as without one.

    Args:
        lengths: length of each row, in tokens.
        batch_size: rows per step.
        seed: seed of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        """Keep the lengths; nothing is drawn yet."""
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is drawn next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The epoch's rows, in order."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        stretch = 50 * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), stretch):
            rows = sorted(order[start : start + stretch], key=self.lengths.__getitem__, reverse=True)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # The short batch must stay last (a loader cuts the stream into equal parts); the others come in any
        # order, or each stretch would run from long rows to short ones.
        full = batches[:-1] if batches and len(batches[-1]) < self.batch_size else batches
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return (row for batch in shuffled + batches[len(full) :] for row in batch)


class Padding(NamedTuple):
    """Share of padding among the tokens that a model reads, in [0, 1): by length, and in a random order."""

    grouped: float
    random: float


def padding(lengths: Sequence[int], batch_size: int, seed: int = 0) -> Padding | None:
    """The padding that grouping by length saves, over an epoch; None where all rows are alike.

    Args:
        lengths: length of each row, in tokens.
        batch_size: rows per batch.
        seed: seed of both orders.
    """
    lengths = list(lengths)
    if len(set(lengths)) < 2 or batch_size < 2:
        return None
    random = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    orders = list(LengthGroupedSampler(lengths, batch_size, seed)), random
    return Padding(*(share(lengths, order, batch_size) for order in orders))


def share(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """The share of padding among the tokens that a model reads, of rows of some lengths in some order."""
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    read = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / read
