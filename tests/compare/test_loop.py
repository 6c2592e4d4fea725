"""The loop: what runs, what is skipped, what wins, what a failure does; with runs that are made up."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compare.spec import METHODS, content, spec
from rich.console import Console

from lorica.compare import loop
from lorica.compare.file import Comparison
from lorica.compare.loop import Failed
from lorica.compare.results import Results
from lorica.compare.runs import Run, cells
from lorica.compare.table import Table
from lorica.errors import ConfigError, LoricaError

Score = Callable[[Run], float]


class Made:
    """Runs that are made up: each scores what a function says, and is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, score: Score) -> None:
        self.score, self.done, self.console = score, list[Run](), Console(file=io.StringIO(), width=200)
        monkeypatch.setattr(loop, "in_this_process", self._run)

    def _run(self, run: Run, folder: Path, *, keep: bool) -> dict[str, Any]:
        value = self.score(run)
        self.done.append(run)
        scores = {s: {"accuracy": v, "f1": 1 - v} for s, v in (("validation", value), ("test", value - 0.1))}
        cost = {"trainable": 10, "checkpoint_bytes": 80, "step_seconds": 0.5, "peak_memory": None}
        return {
            "key": run.key,
            "task": run.task,
            "scores": scores,
            "learning_rate": run.rate,
            "seed": run.seed,
            **cost,
        }

    def compare(self, comparison: Comparison) -> Table:
        self.done.clear()
        return loop.compare(comparison, console=self.console, in_process=True)

    @property
    def shown(self) -> str:
        file = self.console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()


def by_rate(run: Run) -> float:
    return {1e-2: 0.6, 3e-2: 0.7, 2e-2: 0.65}[run.rate or 0] + 0.01 * run.seed


def test_the_best_rate_runs_the_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Made(monkeypatch, by_rate)
    table = made.compare(spec(tmp_path))
    assert [(r.method, r.rate, r.seed) for r in made.done] == [
        ("BitFit", 1e-2, 0),
        ("BitFit", 3e-2, 0),
        ("BitFit", 3e-2, 1),
        ("LoRA", 2e-2, 0),
        ("LoRA", 2e-2, 1),
    ]
    bitfit, lora = table.scores
    assert bitfit.learning_rate == 3e-2
    assert bitfit.values == pytest.approx([0.6, 0.61])
    assert bitfit.centre == pytest.approx(0.605)
    assert bitfit.deviation == pytest.approx(0.01 / math.sqrt(2))
    assert (bitfit.best, lora.best) == (True, False)
    assert "[5/5] mood · LoRA · lr 0.02 · seed 1: accuracy validation 0.6600, test 0.5600" in made.shown
    assert "0:00 left" in made.shown


def test_nothing_runs_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Made(monkeypatch, by_rate)
    first = made.compare(spec(tmp_path))
    assert made.compare(spec(tmp_path)) == first
    assert not made.done
    made.compare(spec(tmp_path, seeds=[0, 1, 2]))
    assert [(r.method, r.seed) for r in made.done] == [("BitFit", 2), ("LoRA", 2)]
    renamed = {"bias only": METHODS["BitFit"], "LoRA": METHODS["LoRA"]}
    assert made.compare(spec(tmp_path, methods=renamed)).scores[0].method == "bias only"
    assert not made.done
    more = {"method": {"r": 3, "target_modules": "all-linear"}, "training": {"learning_rate": 2e-2}}
    made.compare(spec(tmp_path, methods={**METHODS, "LoRA": more}))
    assert {r.method for r in made.done} == {"LoRA"}
    assert loop.gather(spec(tmp_path)) == first


def test_other_rows_are_another_run(tmp_path: Path) -> None:
    def keys() -> list[str]:
        return [run.key for cell in cells(spec(tmp_path), {"mood": "accuracy"}) for run in cell.trials]

    before = keys()
    moved = tmp_path / "elsewhere"
    content(tmp_path)
    (tmp_path / "rows").rename(moved)
    tasks = {"mood": {"task": "sequence-classification", "data": {"train": "elsewhere"}}}
    again = cells(spec(tmp_path, tasks=tasks), {"mood": "accuracy"})
    assert [run.key for cell in again for run in cell.trials] == before
    moved.rename(tmp_path / "rows")
    with (tmp_path / "rows" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "lovely film", "label": "good"}) + "\n")
    assert not set(keys()) & set(before)


def test_a_failing_run_is_shown_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def score(run: Run) -> float:
        if run.rate == 3e-2 or (run.method == "LoRA" and run.seed == 1 and failing):
            raise Failed("no memory")
        return by_rate(run)

    failing = True
    made = Made(monkeypatch, score)
    table = made.compare(spec(tmp_path))
    assert table.failures == [
        "mood · BitFit · lr 0.03 · seed 0: no memory",
        "mood · LoRA · lr 0.02 · seed 1: no memory",
    ]
    assert table.scores[0].learning_rate == 1e-2
    assert str(table.scores[1]) == "55.0 (1 of 2)"
    assert "[2/5] mood · BitFit · lr 0.03 · seed 0: FAILED: no memory" in made.shown
    assert "- mood · LoRA · lr 0.02 · seed 1: no memory" in table.markdown()
    failing = False
    assert len(made.compare(spec(tmp_path)).failures) == 1  # what failed is tried again
    assert [r.method for r in made.done] == ["LoRA"]


def test_not_a_number_never_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Made(monkeypatch, lambda run: math.nan if run.rate == 1e-2 else 0.5)
    table = made.compare(spec(tmp_path))
    assert table.scores[0].learning_rate == 3e-2
    rates = {"BitFit": {**METHODS["BitFit"], "learning_rates": [1e-2]}, "LoRA": METHODS["LoRA"]}
    table = made.compare(spec(tmp_path, methods=rates))
    assert [(str(score), score.best) for score in table.scores] == [
        ("diverged", False),
        ("40.0 ± 0.0", False),
    ]
    made.score = lambda run: math.nan
    worse = {"BitFit": {**METHODS["BitFit"], "learning_rates": [4e-2, 5e-2]}, "LoRA": METHODS["LoRA"]}
    assert str(made.compare(spec(tmp_path, methods=worse)).scores[0]) == "diverged"
    text = (tmp_path / "out" / "results.jsonl").read_text()
    assert "NaN" not in text
    assert '"accuracy": null' in text


def test_a_loss_is_better_when_lower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Made(monkeypatch, by_rate)
    made_run = made._run
    monkeypatch.setattr(
        loop,
        "in_this_process",
        lambda run, folder, keep: {
            **made_run(run, folder, keep=keep),
            "scores": {s: {"loss": by_rate(run)} for s in ("validation", "test")},
        },
    )
    tasks = {"mood": {"task": "sequence-classification", "data": {"train": "rows"}, "metric": "loss"}}
    table = made.compare(spec(tmp_path, tasks=tasks))
    assert [score.learning_rate for score in table.scores] == [1e-2, 2e-2]
    assert [score.best for score in table.scores] == [True, False]


def test_other_metrics_are_shown_and_decide_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Made(monkeypatch, by_rate)
    given: dict[str, Any] = {"task": "sequence-classification", "data": {"train": "rows"}}
    alone = made.compare(spec(tmp_path, tasks={"mood": given}))
    table = made.compare(spec(tmp_path, tasks={"mood": {**given, "also": ["f1"]}}))
    assert table.columns == ["mood (accuracy)", "mood (f1)"]
    assert table.deciding == alone.scores
    assert [s.values for s in table.scores[1::2]] == [[1 - (v or 0) for v in s.values] for s in alone.scores]
    head, _ = table.rows()
    assert "average" not in head
    assert table.rates() == alone.rates()


def test_a_metric_that_is_none_stops_at_the_first_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = Made(monkeypatch, by_rate)
    tasks = {"mood": {"data": {"train": "rows"}, "metric": "acuracy"}}
    with pytest.raises(
        ConfigError, match="no metric 'acuracy' of the validation rows of mood; there are: acc"
    ):
        made.compare(spec(tmp_path, tasks=tasks))
    assert len(made.done) == 1
    made.compare(spec(tmp_path))
    with pytest.raises(ConfigError, match="no metric 'acuracy'"):
        loop.gather(spec(tmp_path, tasks=tasks))  # nor once there are results


def test_a_line_cut_off_by_a_kill_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Made(monkeypatch, by_rate)
    whole = made.compare(spec(tmp_path))
    path = tmp_path / "out" / "results.jsonl"
    text = path.read_text()
    for cut in (len(text) - 1, len(text) - 30, text.index("\n") + 12):
        path.write_text(text[:cut])
        assert made.compare(spec(tmp_path)) == whole
        assert 0 <= len(made.done) <= 4
        assert len(Results(path).rows) == 5
    path.write_bytes(b"\xff\xfe garbage\n[1]\n{}\n" + text.encode())
    assert made.compare(spec(tmp_path)) == whole
    assert not made.done


def test_two_at_once_are_one_too_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def score(run: Run) -> float:
        with pytest.raises(LoricaError, match="another comparison is at work"):
            loop.compare(spec(tmp_path), console=made.console, in_process=True)
        return 0.5

    made = Made(monkeypatch, score)
    made.compare(spec(tmp_path))


def test_median_and_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {0: 0.6, 1: 0.7, 2: 0.9}
    made = Made(
        monkeypatch, lambda run: values[run.seed] + (0.05 if run.recipe.data.train_rows is None else 0.0)
    )
    given = {
        "summary": "median",
        "seeds": [0, 1, 2],
        "sizes": [20, "all"],
        "methods": {"LoRA": METHODS["LoRA"]},
    }
    table = made.compare(spec(tmp_path, **given))
    assert table.columns == ["mood, n = 20 (accuracy)", "mood (accuracy)"]
    assert [score.centre for score in table.scores] == pytest.approx([0.6, 0.65])
    head, rows = table.rows()
    assert head[3:6] == ["mood, n = 20 (accuracy)", "mood (accuracy)", "average"]
    assert rows[0][3:6] == ["60.0 ± 15.3", "65.0 ± 15.3", "62.5"]


def test_a_line_may_hold_any_character(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Made(monkeypatch, by_rate)
    made.compare(spec(tmp_path))
    results = Results(tmp_path / "out" / "results.jsonl")
    results.add({"key": "odd", "scores": {}, "separator": "\u2028 and \x85"})
    assert Results(results.path).rows == results.rows
