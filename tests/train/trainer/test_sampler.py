from __future__ import annotations

import random

import pytest
import torch

from lorica.train.trainer.sampler import LengthGroupedSampler
from lorica.train.trainer.sampler import padding as saved

LENGTHS = random.Random(0).choices(range(3, 61), k=1003)


def padding(order: list[int], batch: int) -> int:
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    return sum(max(LENGTHS[i] for i in rows) * len(rows) - sum(LENGTHS[i] for i in rows) for rows in batches)


def test_each_row_once() -> None:
    assert sorted(LengthGroupedSampler(LENGTHS, 16)) == list(range(1003))
    assert list(LengthGroupedSampler([5], 16)) == [0]


def test_little_padding() -> None:
    order = list(LengthGroupedSampler(LENGTHS, 16))
    assert padding(order, 16) < padding(torch.randperm(1003).tolist(), 16) / 8


def test_the_order_hangs_on_seed_and_epoch_alone() -> None:
    sampler = LengthGroupedSampler(LENGTHS, 16, seed=1)
    first = list(sampler)
    torch.rand(3)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedSampler(LENGTHS, 16, seed=2)) != first


def test_lengths_are_spread_over_the_epoch() -> None:
    order = list(LengthGroupedSampler(LENGTHS, 16))
    halves = [sum(LENGTHS[i] for i in order[part]) / 500 for part in (slice(0, 500), slice(500, 1000))]
    assert abs(halves[0] - halves[1]) < 6


def test_the_share_of_padding_by_hand() -> None:
    # Of (4, 3) and (2, 1) the model reads 8 and 4 tokens, of which 10 are the rows' own.
    found = saved([1, 2, 3, 4], 2)
    assert found is not None
    assert found.grouped == pytest.approx(1 / 6)
    assert found.random in (pytest.approx(1 / 6), pytest.approx(2 / 7), pytest.approx(3 / 8))
    assert saved([3, 3, 3], 2) is None
    assert saved([1, 2, 3], 1) is None
