from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lorica.errors import ConfigError
from lorica.train import Recipe
from lorica.tune import Evaluation, Goal, Record, SearchConfig, Space
from lorica.tune.journal import Journal, Status
from lorica.tune.samplers import make_sampler
from lorica.tune.searching import _Trials

SPACE = Space(
    {
        "learning_rate": {"loguniform": [1e-5, 1e-1]},
        "method.r": {"choice": [2, 4, 8]},
        "method.target_modules": {"choice": [["query"], ["query", "value"]]},
    }
)
CHOICES = Space({"method.r": {"choice": [2, 4]}, "training.seed": {"integer": [0, 2]}})


def test_random_hangs_on_the_seed_and_the_index() -> None:
    one, other = (make_sampler("random", SPACE, seed=3) for _ in range(2))
    assert [one.values(i) for i in range(4)] == [other.values(i) for i in (0, 1, 2, 3)]
    assert other.values(2) == one.values(2)
    assert make_sampler("random", SPACE, seed=4).values(0) != one.values(0)


def test_the_grid_is_every_combination() -> None:
    sampler = make_sampler("grid", CHOICES, seed=0)
    found = [sampler.values(i) for i in range(6)]
    assert found[0] == {"method.r": 2, "training.seed": 0}
    assert found[1] == {"method.r": 2, "training.seed": 1}
    assert len({str(values) for values in found}) == 6
    assert sampler.values(6) is None
    with pytest.raises(ConfigError, match="is a range"):
        make_sampler("grid", SPACE, seed=0)


def score(values: dict[str, object]) -> float:
    rate = values["training.learning_rate"]
    assert isinstance(rate, float)
    return -abs(math.log10(rate) + 3)


def test_tpe_finds_what_random_does_not_and_is_repeatable() -> None:
    pytest.importorskip("optuna", reason="needs lorica[tune]")
    runs = []
    for _ in range(2):
        sampler = make_sampler("tpe", SPACE, seed=1)
        found = []
        for i in range(40):
            values = sampler.values(i)
            assert values is not None
            sampler.tell(values, [score(values)])
            found.append(values)
        runs.append(found)
    assert runs[0] == runs[1]
    late = [score(values) for values in runs[0][20:]]
    drawn = [score(make_sampler("random", SPACE, seed=1).values(i) or {}) for i in range(20)]
    assert sum(late) / 20 > sum(drawn) / 20 + 0.2
    assert all(values["method.target_modules"] in (["query"], ["query", "value"]) for values in runs[0])


def test_tpe_goes_on_as_if_it_had_not_stopped() -> None:
    pytest.importorskip("optuna", reason="needs lorica[tune]")
    whole = make_sampler("tpe", SPACE, seed=2)
    found = []
    for i in range(15):
        values = whole.values(i)
        assert values is not None
        whole.tell(values, [score(values) if i != 3 else math.nan])
        found.append(values)
    again = make_sampler("tpe", SPACE, seed=2)
    for i, values in enumerate(found[:14]):
        again.tell(values, [score(values) if i != 3 else math.nan])
    assert again.values(14) == found[14]


def test_tpe_goes_on_beside_trials_under_way(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Two at once; what runs at the moment of the interruption counts in the next draws as it did."""
    pytest.importorskip("optuna", reason="needs lorica[tune]")
    space = Space({"learning_rate": {"loguniform": [1e-5, 1e-1]}, "r": {"integer": [1, 64]}})
    config = SearchConfig(trials=60, algorithm="tpe")

    def begin(known: Mapping[str, Record]) -> _Trials:
        sampler = make_sampler("tpe", space, seed=0)
        trials = _Trials(make_recipe(), space, sampler, config, Goal("accuracy", "max"))
        journal = Journal(tmp_path / "none.jsonl")
        journal.records.update(known)
        trials.recall(journal)
        return trials

    def record(name: str, status: Status) -> Record:
        values = whole.values[name]
        scores = {"accuracy": score(values) - abs(values["method.r"] - 20) / 20}
        return Record(name, values, status, [Evaluation(1, 1, 1.0, scores, 1.0)])

    whole = begin({})
    running = [next(whole)[0], next(whole)[0]]
    known: dict[str, Record] = {}
    while len(whole.values) < 40:
        name = running.pop(len(whole.values) % 2)
        whole.report(record(name, "finished"))
        known = {n: record(n, "running" if n in running else "finished") for n in whole.values}
        running.append(next(whole)[0])
    again = begin(known)
    assert [next(again)[0] for _ in whole.values][-1] == running[-1]
    assert again.values == whole.values


def test_two_objectives() -> None:
    pytest.importorskip("optuna", reason="needs lorica[tune]")
    sampler = make_sampler("tpe", SPACE, seed=0, objectives=2)
    for i in range(12):
        values = sampler.values(i)
        assert values is not None
        sampler.tell(values, [score(values), -float(values["method.r"])])


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ConfigError, match="no algorithm 'randm'; did you mean 'random'"):
        make_sampler("randm", SPACE, seed=0)
