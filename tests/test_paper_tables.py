"""The benchmark of the paper's tables: what it runs is there, and what it says follows from the figures."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lorica.compare.table import Cost, Score, Table

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("transformers", reason="needs: pip install 'lorica[train]'")
    monkeypatch.syspath_prepend(str(BENCH))
    found = import_module("paper_tables")
    monkeypatch.setattr(found, "folder", lambda: Path("decoder"))
    return found


@pytest.mark.parametrize("number", ["3", "4", "5", "6", "8", "13", "14", "15", "16", "18"])
def test_statements_are_about_what_is_run(bench: Any, number: str) -> None:
    study = bench.STUDIES[number]
    spec = bench.comparison(study)
    for statement in study.statements:
        assert {*statement.first, *statement.second} <= set(spec.methods)
        assert statement.size in spec.sizes
        task = spec.tasks[statement.task or next(iter(spec.tasks))]
        assert statement.metric is None or statement.metric in task.also
        assert statement.task is not None or len(spec.tasks) == 1
    for name, entry in spec.methods.items():
        assert entry.few_shot is not None or entry.learning_rates, name
        for task in spec.tasks:
            spec.laid(task, name)
    width = len(study.own["columns"])
    assert all(len(row) == width for row in study.own["rows"])


def test_only_what_has_run_is_spoken_of(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    study = bench.STUDIES["3"]
    spec = bench.comparison(study)
    monkeypatch.setattr(bench, "is_whole", lambda part: set(part.methods) <= {"FT", "LoRA", "PreLayer"})
    part = bench.finished(spec)
    assert list(part.methods) == [name for name in spec.methods if name in ("FT", "LoRA", "PreLayer")]
    said = bench.about(study, part)
    assert 0 < len(said) < len(study.statements)
    assert all({*statement.first, *statement.second} <= set(part.methods) for statement in said)


def table(of: dict[str, list[float]], metric: str = "accuracy") -> Table:
    """Methods of one series with their seeds' scores."""
    from statistics import mean, stdev

    scores = [
        Score("T", None, metric, name, 1e-3, [*values], mean(values), stdev(values), 0)
        for name, values in of.items()
    ]
    costs = [Cost(name, "additive", "one", 1, 1, 0.1, None) for name in of]
    return Table(scores, costs, "mean", "test", [])


@pytest.mark.parametrize(
    ("level", "values", "metric", "holds"),
    [
        (False, {"a": [0.90, 0.91], "b": [0.80, 0.81]}, "accuracy", "yes"),
        (False, {"a": [0.80, 0.81], "b": [0.90, 0.91]}, "accuracy", "no"),
        (False, {"a": [0.80, 0.81], "b": [0.90, 0.91]}, "loss", "yes"),
        (False, {"a": [0.80, 0.90], "b": [0.85, 0.83]}, "accuracy", "not told apart"),
        (True, {"a": [0.80, 0.81], "b": [0.81, 0.81]}, "accuracy", "yes"),
        (True, {"a": [0.80, 0.81], "b": [0.90, 0.91]}, "accuracy", "no"),
        (True, {"a": [0.75, 0.95], "b": [0.88, 0.88]}, "accuracy", "not told apart"),
    ],
)
def test_verdicts(bench: Any, level: bool, values: dict[str, list[float]], metric: str, holds: str) -> None:
    statement = import_module("paper_studies").Statement("a, b", "2, 1", ("a",), ("b",), level)
    row = bench.judged(table(values, metric), statement)
    assert row[-1] == holds
    assert (" 1 hold here" in bench.claim([row])) == (holds == "yes")


def test_one_seed_and_few_rows(bench: Any) -> None:
    made = table({"a": [0.90, 0.91], "b": [0.84, 0.85]})
    ones = [replace(score, values=score.values[:1], deviation=None) for score in made.scores]
    statement = import_module("paper_studies").above("a, b", "2, 1", "a", "b")
    alone = replace(made, scores=ones)
    assert [bench.judged(alone, statement, least)[-1] for least in (None, 0.11)] == ["yes", "not told apart"]


def test_noise_by_hand(bench: Any) -> None:
    """Variances 0.0002 and 0.0008 have the mean 0.0005; two and two runs: √(0.0005·(1/2 + 1/2))."""
    made = table({"a": [0.80, 0.82], "b": [0.70, 0.74]})
    assert bench.noise(made, made.scores, made.scores[:1], made.scores[1:]) == pytest.approx(0.0005**0.5)
    alone = [made.scores[0].__class__("T", None, "accuracy", "a", None, [0.8], 0.8, None, 0)]
    assert bench.noise(made, alone, alone, alone) is None
