"""Trials in processes of Ray's: few and small, since each costs a process and its imports."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from on_ray import cluster
from ranks import on_ranks, started
from rich.console import Console
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification
from tune.searches import run_each, silent
from waiting import until

from lorica.cli import main
from lorica.errors import ConfigError, LoricaError
from lorica.train import LaunchConfig, Recipe, train
from lorica.train import Record as RunRecord
from lorica.tune import SearchConfig, Space, search
from lorica.tune.journal import Journal
from lorica.tune.population.shared_base import PackedModel

ray = pytest.importorskip("ray", reason="needs lorica[tune]")
from tune.killed_on_ray import tune_and_die  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = """
import os, signal
from pathlib import Path
from lorica.train.tasks import SequenceClassification

class Deadly(SequenceClassification):
    name = "deadly"

    def metrics(self, outcome, features):
        Path({marker!r}, str(os.getpid())).touch()
        try:
            Path({marker!r}, "killed").touch(exist_ok=False)
        except FileExistsError:
            return super().metrics(outcome, features)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    with cluster():
        yield


def test_a_process_trains_a_population_and_survives_a_kill_and_failing_trials(
    two_cpus: None, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    task, marks = tmp_path / "task.py", tmp_path / "marks"
    marks.mkdir()
    task.write_text(TASK.format(marker=str(marks)))
    recipe = make_recipe(epochs=2, save_steps=3).replace(task=f"{task}:Deadly")
    space = {
        "method.target_modules": {"choice": [["query", "value"], ["nothing"]]},
        "method.r": {"choice": [1, 2]},
    }
    config = SearchConfig(algorithm="grid", scheduler="none", engine="ray", slots=4)
    output = io.StringIO()
    found = search(recipe, space, tmp_path / "s", config, console=Console(file=output, width=200))
    assert "2 trials together in each process" in output.getvalue()
    statuses = {record.name: record.status for record in found.records}
    assert statuses == {"000": "finished", "001": "finished", "002": "failed", "003": "failed"}
    assert "nothing" in (found.records[2].error or "")
    processes = list(marks.glob("[0-9]*"))
    assert len(processes) == 2, "both trials were in the one that was killed, then in another"
    for name, r in (("000", 1), ("001", 2)):
        method = {"r": r, "target_modules": ["query", "value"]}
        alone = train(
            recipe.replace(
                method=method, training={"metric_for_best": "accuracy"}, output=str(tmp_path / f"alone{r}")
            ),
            console=Console(file=io.StringIO()),
        )
        theirs = load_file(alone.output / "adapter_model.safetensors")
        ours = load_file(tmp_path / "s" / "trials" / name / "adapter_model.safetensors")
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-6)
        times = [each.time for each in next(x for x in found.records if x.name == name).evaluations]
        assert times == [1, 2]
    assert found.best is not None
    # Resuming what is complete trains nothing.
    lines = (tmp_path / "s" / "results.jsonl").read_text()
    again = search(recipe, space, tmp_path / "s", config, resume=True, console=Console(file=io.StringIO()))
    assert {record.name: record.status for record in again.records} == statuses
    assert (tmp_path / "s" / "results.jsonl").read_text() == lines
    assert all(json.loads(line) for line in lines.splitlines())


def test_a_trial_of_two_workers_is_the_run_of_lorica_train(
    two_cpus: None, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.train", reason="needs lorica[ray]")
    recipe, space = make_recipe(), {"method.r": {"choice": [2]}}
    monkeypatch.chdir(Path(recipe.model).parent)  # where the workers begin, a path from here leads nowhere
    recipe = recipe.replace(model=Path(recipe.model).name)
    config = SearchConfig(trials=1, metric="loss", launch=LaunchConfig(processes=2, engine="ray"))
    output = io.StringIO()
    found = search(recipe, space, tmp_path / "s", config, console=Console(file=output, width=200))
    assert "up to 1 trials, each in 2 workers of Ray on this machine" in output.getvalue()
    assert "1 trial of 2 workers at once" in output.getvalue()
    (record,) = found.records
    assert (record.status, [each.step for each in record.evaluations]) == ("finished", [5, 10])
    assert found.folder is not None
    kept = RunRecord.load(found.folder)
    alone = kept.recipe.replace(model=str(Path(recipe.model).resolve()), output=str(tmp_path / "alone"))
    assert on_ranks(run_each, [alone]) == [[(kept.adapter_sha256, kept.results["metrics"])]] * 2
    assert not (tmp_path / "s" / "trials" / "000" / "checkpoints" / "ray").exists()
    config = SearchConfig(launch=LaunchConfig(processes=3, engine="ray"))
    with pytest.raises(LoricaError, match=r"a trial of 3 workers needs 3 times {'cpu': 1}"):
        search(recipe, space, tmp_path / "t", config, console=silent())


def test_a_search_whose_driver_was_killed_ends_as_if_it_had_not_been(
    two_cpus: None, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(epochs=2, batch_size=8)
    recipe.save(tmp_path / "recipe.yaml")
    (tmp_path / "space.yaml").write_text("training.learning_rate: {choice: [3.0e-3, 1.0e-9, 2.0e-3]}\n")
    out = tmp_path / "out"
    options = {
        "space": tmp_path / "space.yaml",
        "algorithm": "grid",
        "metric": "loss",
        "engine": "ray",
        "slots": 3,
        "resources": '{"cpu": 2}',  # one process for all, which makes the order of evaluations known
        "output": out,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    address, before = ray.get_runtime_context().gcs_address, at_work()
    killed = started(tune_and_die, address, [str(tmp_path / "recipe.yaml"), *flags], world=None).wait()[0]
    assert killed.code == -signal.SIGKILL, killed.output
    until_ended(before)
    statuses = {record.status for record in Journal(out / "results.jsonl").records.values()}
    assert "finished" not in statuses

    assert main(["tune", "--resume", str(out)]) == 0
    config = SearchConfig(algorithm="grid", metric="loss", slots=3)
    whole = search(
        recipe,
        Space.load(tmp_path / "space.yaml"),
        tmp_path / "w",
        config,
        console=Console(file=io.StringIO()),
    )
    resumed = Journal(out / "results.jsonl").records
    assert {record.status for record in whole.records} == {"finished", "stopped"}
    assert resumed.keys() == {record.name for record in whole.records}
    for record in whole.records:
        again = resumed[record.name]
        assert again.status == record.status
        assert [each.step for each in again.evaluations] == [each.step for each in record.evaluations]
        for ours, theirs in zip(again.evaluations, record.evaluations, strict=True):
            assert ours.metrics == pytest.approx(theirs.metrics, abs=1e-6)


def until_ended(before: Mapping[int, str]) -> None:
    """Wait until Ray has ended the actors that came after others, since their driver is gone."""
    until(lambda: not at_work().keys() - before.keys(), "the end of the actors", every=0.1)


def at_work() -> dict[int, str]:
    """Actors of this process's Ray: their processes, and what each calls itself."""
    found = {}
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            (title, *_) = each.cmdline() or [""]
            if title.startswith("ray::") and not re.search("IDLE|Agent", title):
                found[each.pid] = title
    return found


def test_nothing_starts_ray_for_a_space_that_is_wrong(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*args: Any, **options: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    config = SearchConfig(engine="ray")
    for space in (
        {"method.rank": {"choice": [1]}},
        {"method.r": {"choice": []}},
        {"method.r": {"choice": [0]}},
    ):
        with pytest.raises(ConfigError):
            search(make_recipe(), space, tmp_path / "s", config)
    assert not (tmp_path / "s").exists()


def test_a_death_is_told_of_once_it_is_final() -> None:
    from lorica.tune.on_ray import Listener

    died: list[Any] = []
    listener = Listener(lambda result: None, died.append)
    for again in (True, False):
        trial = SimpleNamespace(config={"trials": [["000", ""]]}, should_recover=lambda again=again: again)
        listener.on_trial_error(None, trial)
        assert died == ([] if again else [trial.config])


def test_paths_start_where_the_search_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorica.tune.on_ray import train_trials

    monkeypatch.chdir("/")
    train_trials({"trials": []}, base=None, directory=str(tmp_path / "s"), here=str(tmp_path))
    assert Path.cwd() == tmp_path


def test_no_part_imports_ray_train() -> None:
    folder = Path(__file__).resolve().parents[2] / "src" / "lorica" / "tune"
    for path in folder.glob("*.py"):
        assert not re.search(r"(import|from) ray\.train\b|from ray import .*\btrain\b", path.read_text()), (
            path
        )


def test_a_shipped_model_computes_the_same_and_cannot_be_written_to() -> None:
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = BertForSequenceClassification(config).bfloat16().eval()
    place = "bert.encoder.layer.0.attention.self.query.weight"
    model.classifier = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    model.classifier.weight = model.get_parameter(place)  # tied
    packed = PackedModel.of(model)
    for array, _, _ in packed.weights:
        array.flags.writeable = False
    there = packed.model()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(there(ids).logits, model(ids).logits)
    assert there.classifier.weight is there.get_parameter(place)
    assert not any(parameter.requires_grad for parameter in there.parameters())
    assert len(packed.modules) < 60_000
