"""Trials that each train in two processes, against the same runs of `lorica train` in two."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from train import tiny
from train.killed import deadly_task
from tune.searches import run_each, silent

from lorica.cli import main
from lorica.errors import ConfigError
from lorica.train import LaunchConfig, Recipe
from lorica.train import Record as RunRecord
from lorica.tune import Record, SearchConfig, Space, search
from lorica.tune.in_processes import Line, _listening, check_trials
from lorica.tune.journal import JOURNAL, Journal
from lorica.tune.schedulers import TrialController


def test_each_is_a_run_of_lorica_train_and_survives_a_kill_and_an_interrupt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    task, marks = deadly_task(tmp_path)
    model, data = tiny.write_model(tmp_path / "model"), tiny.write_data(tmp_path / "data")
    recipe = tiny.recipe(model, data, tmp_path / "unused", save_steps=3).replace(task=task)
    recipe.save(tmp_path / "recipe.yaml")
    (tmp_path / "space.yaml").write_text("training.learning_rate: {choice: [1.0e-2, 1.0e-9, 1.0, 2.0]}\n")
    given = [str(tmp_path / "recipe.yaml"), "--space", str(tmp_path / "space.yaml"), "--trust_task"]
    given += ["--algorithm", "grid", "--metric", "loss", "--launch.processes", "2", "--output", str(out)]
    evaluated, created = TrialController.trial_evaluated, TrialController.trial_created

    def interrupting(self: TrialController, name: str, *args: Any, **more: Any) -> bool:
        if name == "001" and not self.journal.record(name).evaluations:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluated(self, name, *args, **more)

    def failing(self: TrialController, name: str, *args: Any) -> Record:
        (marks / "fail").touch() if name == "003" else None
        return created(self, name, *args)

    monkeypatch.setattr(TrialController, "trial_evaluated", interrupting)
    monkeypatch.setattr(TrialController, "trial_created", failing)
    # One process is killed in the first trial's second evaluation; both are interrupted in the second trial.
    assert main(["tune", *given]) == 130
    said = capsys.readouterr()
    assert "trials, one at a time, each in 2 processes (ddp)" in said.out
    assert "was lost" in said.err
    assert f"resume with: lorica tune --resume {out}" in said.err
    assert {name: each.status for name, each in Journal(out / JOURNAL).records.items()} == {
        "000": "finished",
        "001": "waiting",
    }
    # The processes may share the model otherwise in what is left of it.
    assert main(["tune", "--resume", str(out), "--trust_task", "--launch.engine", "fsdp2"]) == 0
    records = Journal(out / JOURNAL).records
    assert [each.status for each in records.values()] == ["finished", "finished", "stopped", "failed"]
    assert [[each.step for each in record.evaluations] for record in records.values()] == [
        [5, 10],
        [5, 10],
        [5],
        [],
    ]
    assert records["003"].error == "RuntimeError: out of memory on one of them"
    assert "out of memory on one of them" in (out / "trials" / "003" / "log.txt").read_text()

    # What finished is what the same runs come to by themselves, to the bit.
    (marks / "fail").unlink()
    kept = [RunRecord.load(out / "trials" / name, trust_task=True) for name in ("000", "001")]
    alone = [each.recipe.replace(output=str(tmp_path / name)) for name, each in zip("ab", kept, strict=True)]
    theirs = [(each.adapter_sha256, each.results["metrics"]) for each in kept]
    assert on_ranks(run_each, alone) == [theirs] * 2
    assert RunRecord.load(out / "best", trust_task=True).adapter_sha256 == kept[1].adapter_sha256
    assert kept[1].machine["processes"] == 2
    assert json.loads((out / "search.json").read_text())["search"]["launch"]["processes"] == 2


def test_a_budget_ends_a_trial_and_keeps_it(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    config = SearchConfig(trials=1, time_budget=1, launch=LaunchConfig(processes=2))
    recipe = make_recipe(epochs=None, max_steps=100_000, eval_steps=50_000, save_steps=100_000)
    found = search(recipe, {"method.r": {"choice": [2]}}, tmp_path / "s", config, console=silent())
    assert [record.status for record in found.records] in (["running"], ["waiting"])
    assert found.best is None


def test_the_line_outlives_strangers_and_errors() -> None:
    def evaluated(step: int) -> bool:
        if step == 3:
            raise OSError("the disk is full")
        return step == 2

    with _listening(None, evaluated) as (line, told):
        with pytest.raises(Exception, match="digest sent was rejected"):
            Line(line.address, b"another").say("finished")
        assert [line.say("evaluation", step=step) for step in (1, 2, 3)] == [False, True, True]
        line.say("stopped")
    assert told == [{"status": "failed", "error": "OSError: the disk is full"}, {"status": "stopped"}]


def test_what_cannot_be_is_refused(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = LaunchConfig(processes=2)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"launch": LaunchConfig(engine="fsdp2")}, "'fsdp2' needs launch.processes"),
        ({"launch": two, "engine": "population"}, "asks for 2 for each; leave one of the two out"),
        (
            {"launch": LaunchConfig(processes=2, machines=2, address="first:29500")},
            r"launch.machines must be 1 in a search, not 2: .* Ray; give engine='ray'",
        ),
        (
            {"launch": LaunchConfig(processes=2, engine="ray", retries=5)},
            "the search's own retries .* instead of --launch.retries 5",
        ),
        ({"launch": two, "resources": {"cpu": 2}}, "resources are what Ray gives each worker"),
    ]
    for values, message in wrong:
        with pytest.raises(ConfigError, match=message):
            SearchConfig(**values)
    recipe, space = make_recipe(), Space({"method.r": {"choice": [1, 2]}})
    with pytest.raises(ConfigError, match=r"auto_batch_size looks for a batch size in one process"):
        check_trials(recipe.replace(training={"auto_batch_size": True}), space, two, here=True)
    with pytest.raises(ConfigError, match="the task grpo trains in one process; leave out"):
        check_trials(recipe.replace(task="grpo"), space, two, here=True)
    assert main(["tune", "--ramp", "--launch.processes", "2"]) == 1
    assert "leave out --launch.processes\n" in capsys.readouterr().err
    # One that began before there were such trials is resumed as it was.
    config = SearchConfig(trials=1, scheduler="none", time_budget=1e-9)
    search(recipe, space, tmp_path / "s", config, console=silent())
    path = tmp_path / "s" / "search.json"
    there = json.loads(path.read_text())
    del there["search"]["launch"]
    path.write_text(json.dumps(there))
    assert main(["tune", "--resume", str(tmp_path / "s"), "--launch.processes", "2"]) == 1
    assert "leave out --launch.processes\n" in capsys.readouterr().err
    assert main(["tune", "--resume", str(tmp_path / "s")]) == 1  # there was no time for a trial
    assert "was started otherwise" not in capsys.readouterr().err
    assert json.loads(path.read_text())["search"]["launch"]["processes"] is None
    with pytest.raises(ConfigError, match=r"launch.processes was None, now 2"):
        search(recipe, space, tmp_path / "s", SearchConfig(launch=two), resume=True, console=silent())
