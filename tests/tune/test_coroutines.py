from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch

from lorica.tune.population.coroutines import BACKWARD, Coroutine, CoroutineGroup, SyncPoint


def draws() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def lockstep(coroutines: Sequence[Coroutine[Any]]) -> list[Coroutine[Any]]:
    """Run coroutines to their ends, in the order in which they end."""
    ended: list[Coroutine[Any]] = []
    with CoroutineGroup() as runner:
        for coroutine in coroutines:
            runner.add(coroutine)
        while runner.coroutines:
            ended += runner.advance()
    return ended


def test_each_draws_what_it_would_draw_alone_and_so_does_the_caller() -> None:
    def work(seed: int, steps: int) -> Any:
        def run(coroutine: Coroutine[Any]) -> list[Any]:
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(seed)
            found = []
            for _ in range(steps):
                coroutine.begin_step()
                found.append(draws())
                coroutine.synchronize(SyncPoint(1, "layer", lambda requests: requests), None)
                found.append(float(torch.rand(())))
                coroutine.synchronize(BACKWARD, torch.zeros((), requires_grad=True) * 1)
                found.append(draws())
            return found

        return run

    alone = [lockstep([Coroutine("x", work(seed, seed + 1))])[0].result for seed in range(3)]
    before = torch.get_rng_state(), random.getstate()
    together = lockstep([Coroutine(str(seed), work(seed, seed + 1)) for seed in range(3)])
    assert [coroutine.name for coroutine in together] == ["0", "1", "2"]
    assert [coroutine.result for coroutine in together] == alone
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_each_is_in_the_autocast_that_it_entered() -> None:
    def work(steps: int, dtype: torch.dtype | None) -> Any:
        def run(coroutine: Coroutine[Any]) -> list[bool]:
            right = []
            for _ in range(steps):
                coroutine.begin_step()
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    for _ in range(steps):
                        coroutine.synchronize(SyncPoint(1, "layer", lambda requests: requests), None)
                        now = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
                        right.append(now is dtype)
                coroutine.synchronize(BACKWARD, torch.zeros((), requires_grad=True) * 1)
                right.append(not torch.is_autocast_enabled("cpu"))
            return right

        return run

    coroutines = [
        Coroutine("b", work(2, torch.bfloat16)),
        Coroutine("f", work(3, None)),
        Coroutine("h", work(1, torch.float16)),
    ]
    ended = lockstep(coroutines)
    assert [coroutine.result for coroutine in ended] == [[True] * steps * (steps + 1) for steps in (1, 2, 3)]
    assert not torch.is_autocast_enabled("cpu")


def test_those_behind_go_first_so_that_all_meet_again() -> None:
    served: list[list[str]] = []

    def serve(requests: Sequence[str]) -> Sequence[str]:
        served.append(list(requests))
        return [f"{request}!" for request in requests]

    def work(layers: list[int]) -> Any:
        def run(coroutine: Coroutine[Any]) -> list[str]:
            coroutine.begin_step()
            return [coroutine.synchronize(SyncPoint(i, i, serve), f"{coroutine.name}{i}") for i in layers]

        return run

    ended = lockstep([Coroutine("a", work([1, 3])), Coroutine("b", work([1, 2, 3]))])
    assert served == [["a1", "b1"], ["b2"], ["a3", "b3"]]
    assert {coroutine.name: coroutine.result for coroutine in ended} == {
        "a": ["a1!", "a3!"],
        "b": ["b1!", "b2!", "b3!"],
    }


def test_an_error_ends_one_lane_alone() -> None:
    def fails(coroutine: Coroutine[int]) -> int:
        coroutine.begin_step()
        raise ValueError("mine")

    def works(coroutine: Coroutine[int]) -> int:
        for _ in range(3):
            coroutine.begin_step()
        return 3

    ended = {
        coroutine.name: coroutine
        for coroutine in lockstep([Coroutine("bad", fails), Coroutine("good", works)])
    }
    assert isinstance(ended["bad"].error, ValueError)
    assert ended["bad"].result is None
    assert ended["good"].result == 3


def test_lanes_left_over_are_closed() -> None:
    closed = []

    def work(coroutine: Coroutine[None]) -> None:
        try:
            while True:
                coroutine.begin_step()
        finally:
            closed.append(coroutine.name)

    def interrupted() -> None:
        with CoroutineGroup() as runner:
            for name in "ab":
                runner.add(Coroutine(name, work))
            runner.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert closed == ["a", "b"]


def test_one_backward_pass_serves_all() -> None:
    weights = [torch.ones((), requires_grad=True) for _ in range(2)]

    def work(i: int) -> Any:
        def run(coroutine: Coroutine[float]) -> float:
            coroutine.begin_step()
            coroutine.synchronize(BACKWARD, (i + 2) * weights[i])
            grad = weights[i].grad
            assert grad is not None
            return float(grad)

        return run

    assert [
        coroutine.result for coroutine in lockstep([Coroutine("0", work(0)), Coroutine("1", work(1))])
    ] == [2.0, 3.0]
