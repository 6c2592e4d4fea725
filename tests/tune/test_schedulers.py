"""The rules against the papers' and Ray Tune's own, evaluation by evaluation."""

from __future__ import annotations

import math
import random
import statistics
from types import SimpleNamespace
from typing import Any

import pytest

from lorica.errors import ConfigError
from lorica.tune import Halving, Median, RunAll, Scheduler


def scores(trials: int, times: int, seed: int) -> dict[tuple[int, str], float]:
    """Scores of interleaved trials, by time and trial."""
    draw = random.Random(seed)
    return {(time, f"t{i}"): draw.random() for time in range(1, times + 1) for i in range(trials)}


@pytest.mark.parametrize(
    ("grace", "factor", "max_t"), [(1, 2, 10), (2, 3, 20), (1, 4, 5), (1, 2.5, 20), (1, 1.3, 12), (2, 1.5, 6)]
)
def test_halving_as_ray_decides(grace: int, factor: float, max_t: int) -> None:
    pytest.importorskip("ray", reason="needs lorica[tune]")
    from ray.tune.schedulers import AsyncHyperBandScheduler

    theirs = AsyncHyperBandScheduler(
        metric="score", mode="max", grace_period=grace, reduction_factor=factor, max_t=max_t
    )
    ours = Halving(grace_period=grace, reduction_factor=factor, max_t=max_t)
    assert 0 < decided_alike(ours, theirs, max_t - 1, seed=grace) < 8


@pytest.mark.parametrize("grace", [1, 2, 3])
def test_the_median_as_ray_decides(grace: int) -> None:
    pytest.importorskip("ray", reason="needs lorica[tune]")
    from ray.tune.schedulers import MedianStoppingRule

    theirs = MedianStoppingRule(
        time_attr="training_iteration", metric="score", mode="max", grace_period=grace
    )
    assert 0 < decided_alike(Median(grace_period=grace), theirs, 8, seed=grace) < 8


def decided_alike(ours: Scheduler, theirs: Any, times: int, seed: int) -> int:
    """Ask both of eight trials, one evaluation after the other; how many left."""
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler

    controller = SimpleNamespace(get_live_trials=list)  # none waits for a place
    trials = {f"t{i}": Trial("x", stub=True, trial_id=f"t{i}") for i in range(8)}
    for trial in trials.values():
        theirs.on_trial_add(controller, trial)
    gone = set()
    for (time, name), score in scores(8, times, seed).items():
        score -= int(name[1:]) / 4
        if name in gone:
            continue
        result = {"training_iteration": time, "score": score}
        said = theirs.on_trial_result(controller, trials[name], result)
        assert ours.stops(name, time, score) == (said == TrialScheduler.STOP)
        if said == TrialScheduler.STOP:
            gone.add(name)
    return len(gone)


def test_halving_by_hand() -> None:
    rule = Halving(grace_period=1, reduction_factor=2, max_t=4)
    assert sorted(rule.rungs) == [1, 2]
    # The first has nothing to be measured by; 0.5 is the median of what came before each.
    assert [rule.stops(*at) for at in [("a", 1, 0.5), ("b", 1, 0.4), ("c", 1, 0.5)]] == [False, True, False]
    assert rule.rungs[1] == {"a": 0.5, "b": 0.4, "c": 0.5}
    assert not rule.stops("a", 2, 0.1)
    assert rule.stops("c", 2, 0.0)
    assert not rule.stops("a", 3, -1.0), "between rungs nobody leaves"


def test_the_median_by_hand() -> None:
    rule, gone = Median(grace_period=2, min_samples=3), []
    seen: dict[str, list[float]] = {}
    for (time, name), score in scores(6, 5, seed=3).items():
        if name in gone:
            continue
        seen.setdefault(name, []).append(score - int(name[1:]) / 4)
        others = [statistics.fmean(s[1:time]) for n, s in seen.items() if n != name and len(s) >= time > 1]
        expected = time >= 2 and len(others) >= 3 and max(seen[name]) < statistics.median(others)
        assert rule.stops(name, time, seen[name][-1]) == expected
        if expected:
            gone.append(name)
    assert gone


def test_not_a_number_leaves_and_does_not_count() -> None:
    rule = Halving()
    assert rule.stops("nan", 1, math.nan)
    assert rule.stops("infinite", 1, -math.inf)
    assert rule.rungs[1] == {}
    assert Median().stops("nan", 1, math.nan)
    assert not RunAll().stops("nan", 1, math.nan)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grace_period": 0}, "grace_period must be from 1 to max_t"),
        ({"grace_period": 5, "max_t": 4}, "from 1 to max_t \\(4\\) evaluations, not 5"),
        ({"reduction_factor": 1}, "reduction_factor must be more than 1, not 1"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Halving(**values)
