"""The processes that other tests start."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, started


def summed(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = tensor * (1 + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), total


def failing() -> None:
    if dist.get_rank() == 1:
        raise ValueError("only here")


def waiting() -> str:
    print("here", os.environ["RANK"])
    time.sleep(60)
    return "never"


def test_each_rank_answers_and_they_share_a_group() -> None:
    assert [(rank, total.tolist()) for rank, total in on_ranks(summed, torch.ones(2))] == [
        (0, [3.0, 3.0]),
        (1, [3.0, 3.0]),
    ]
    with pytest.raises(AssertionError, match=r"(?s)\{1: 1\}.*--- rank 1.*ValueError: only here"):
        on_ranks(failing)


def test_a_rank_is_sent_signals_and_is_not_waited_for_without_end() -> None:
    ranks = started(waiting)
    while not all("here" in ranks.output(rank) for rank in range(2)):
        time.sleep(0.05)
    ranks.send(0, signal.SIGKILL)
    with pytest.raises(AssertionError, match=r"(?s)ranks \[1\] did not end.*here 1.*in waiting"):
        ranks.wait(1)
