from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch

from lorica.tune.lockstep import LAST, Lane, Lockstep, Place


def draws() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def lockstep(lanes: Sequence[Lane[Any]]) -> list[Lane[Any]]:
    """Run lanes to their ends, in the order in which they end."""
    ended: list[Lane[Any]] = []
    with Lockstep() as runner:
        for lane in lanes:
            runner.add(lane)
        while runner.lanes:
            ended += runner.advance()
    return ended


def test_each_draws_what_it_would_draw_alone_and_so_does_the_caller() -> None:
    def work(seed: int, steps: int) -> Any:
        def run(lane: Lane[Any]) -> list[Any]:
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(seed)
            found = []
            for _ in range(steps):
                lane.begin_step()
                found.append(draws())
                lane.meet(Place(1, "layer", lambda requests: requests), None)
                found.append(float(torch.rand(())))
                lane.meet(LAST, torch.zeros((), requires_grad=True) * 1)
                found.append(draws())
            return found

        return run

    alone = [lockstep([Lane("x", work(seed, seed + 1))])[0].result for seed in range(3)]
    before = torch.get_rng_state(), random.getstate()
    together = lockstep([Lane(str(seed), work(seed, seed + 1)) for seed in range(3)])
    assert [lane.name for lane in together] == ["0", "1", "2"]
    assert [lane.result for lane in together] == alone
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_each_is_in_the_autocast_that_it_entered() -> None:
    def work(steps: int, dtype: torch.dtype | None) -> Any:
        def run(lane: Lane[Any]) -> list[bool]:
            right = []
            for _ in range(steps):
                lane.begin_step()
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    for _ in range(steps):
                        lane.meet(Place(1, "layer", lambda requests: requests), None)
                        now = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
                        right.append(now is dtype)
                lane.meet(LAST, torch.zeros((), requires_grad=True) * 1)
                right.append(not torch.is_autocast_enabled("cpu"))
            return right

        return run

    lanes = [Lane("b", work(2, torch.bfloat16)), Lane("f", work(3, None)), Lane("h", work(1, torch.float16))]
    ended = lockstep(lanes)
    assert [lane.result for lane in ended] == [[True] * steps * (steps + 1) for steps in (1, 2, 3)]
    assert not torch.is_autocast_enabled("cpu")


def test_those_behind_go_first_so_that_all_meet_again() -> None:
    served: list[list[str]] = []

    def serve(requests: Sequence[str]) -> Sequence[str]:
        served.append(list(requests))
        return [f"{request}!" for request in requests]

    def work(layers: list[int]) -> Any:
        def run(lane: Lane[Any]) -> list[str]:
            lane.begin_step()
            return [lane.meet(Place(i, i, serve), f"{lane.name}{i}") for i in layers]

        return run

    ended = lockstep([Lane("a", work([1, 3])), Lane("b", work([1, 2, 3]))])
    assert served == [["a1", "b1"], ["b2"], ["a3", "b3"]]
    assert {lane.name: lane.result for lane in ended} == {"a": ["a1!", "a3!"], "b": ["b1!", "b2!", "b3!"]}


def test_an_error_ends_one_lane_alone() -> None:
    def fails(lane: Lane[int]) -> int:
        lane.begin_step()
        raise ValueError("mine")

    def works(lane: Lane[int]) -> int:
        for _ in range(3):
            lane.begin_step()
        return 3

    ended = {lane.name: lane for lane in lockstep([Lane("bad", fails), Lane("good", works)])}
    assert isinstance(ended["bad"].error, ValueError)
    assert ended["bad"].result is None
    assert ended["good"].result == 3


def test_lanes_left_over_are_closed() -> None:
    closed = []

    def work(lane: Lane[None]) -> None:
        try:
            while True:
                lane.begin_step()
        finally:
            closed.append(lane.name)

    def interrupted() -> None:
        with Lockstep() as runner:
            for name in "ab":
                runner.add(Lane(name, work))
            runner.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert closed == ["a", "b"]


def test_one_backward_pass_serves_all() -> None:
    weights = [torch.ones((), requires_grad=True) for _ in range(2)]

    def work(i: int) -> Any:
        def run(lane: Lane[float]) -> float:
            lane.begin_step()
            lane.meet(LAST, (i + 2) * weights[i])
            grad = weights[i].grad
            assert grad is not None
            return float(grad)

        return run

    assert [lane.result for lane in lockstep([Lane("0", work(0)), Lane("1", work(1))])] == [2.0, 3.0]
