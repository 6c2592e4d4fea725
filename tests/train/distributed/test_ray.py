"""A run in two workers of Ray Train, one of which is lost, against one in two processes of torch's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.train", reason="needs lorica[ray]")

from on_ray import cluster
from ranks import on_ranks
from ray.train import RunConfig, ScalingConfig
from safetensors.torch import load_file
from train import tiny
from train.killed import deadly_task

from lorica.cli import main
from lorica.errors import LoricaError
from lorica.train import Recipe, train
from lorica.train.ray import TorchTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def two_cpus() -> Iterator[None]:
    with cluster():
        yield


def run(recipe: Recipe) -> str:
    """A run of this process's group; what came out."""
    return train(recipe).adapter_sha256


def losses(output: Path) -> list[Any]:
    """Of every step, and every score, as the last checkpoint has them."""
    last = max((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    timing = ("runtime", "per_second", "memory")
    return [{name: v for name, v in entry.items() if not any(t in name for t in timing)} for entry in log]


def test_a_worker_that_is_killed_changes_no_bit(
    two_cpus: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, marks = deadly_task(tmp_path)
    model, data = tiny.write_model(tmp_path / "model"), tiny.write_data(tmp_path / "data")
    made = tiny.recipe(model, data, tmp_path / "ray", epochs=3, save_steps=3, logging_steps=1)
    made = made.replace(task=task)
    made.save(tmp_path / "recipe.yaml")
    options = ["--launch.engine", "ray", "--launch.processes", "2", "--trust_task"]
    assert main(["train", str(tmp_path / "recipe.yaml"), *options]) == 0
    # Called once for the largest class and in the first two evaluations; after the loss of a worker, for the
    # largest class, in the last two evaluations, of the test rows, and for both splits' largest class.
    assert (marks / "1").read_text() == 9 * "."
    said = capsys.readouterr().out
    assert "encoding 40 train rows" in said
    assert "TrainController" not in said

    first, second = on_ranks(run, made.replace(output=str(tmp_path / "torch")))
    record = json.loads((tmp_path / "ray" / "run.json").read_text())
    assert first == second == record["adapter_sha256"]
    assert losses(tmp_path / "ray") == losses(tmp_path / "torch")
    assert record["machine"]["processes"] == 2
    assert load_file(tmp_path / "ray" / "adapter_model.safetensors")
    assert not (tmp_path / "ray" / "checkpoints" / "ray").exists()


def test_outputs_are_where_the_storage_is_and_are_not_trodden_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = SimpleNamespace(return_value=None)
    monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", lambda self: fitted)
    made = tiny.recipe(tmp_path / "model", tmp_path / "data", Path("runs/one"))
    workers, storage = ScalingConfig(num_workers=2), RunConfig(storage_path=str(tmp_path))
    trainer = TorchTrainer(made, scaling_config=workers, run_config=storage)
    assert trainer.recipe.output == str(tmp_path / "runs" / "one")
    assert trainer.fit() is fitted
    kept = tmp_path / "runs" / "one" / "adapter_config.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("{}")
    with pytest.raises(LoricaError, match="holds a run already"):
        trainer.fit()
    refused = SimpleNamespace(return_value="no such column")
    again = TorchTrainer(made, scaling_config=workers, run_config=storage, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("ray.train.torch.TorchTrainer.fit", lambda self: refused)
        with pytest.raises(LoricaError, match="no such column"):
            again.fit()
    assert again.fit() is fitted
    assert kept.exists()
    assert TorchTrainer(made, scaling_config=workers, run_config=storage, overwrite=True).fit() is fitted
    assert not kept.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--launch.engine", "ray"], "launch.processes must be"),
        (
            ["train", "--launch.engine", "ray", "--launch.processes", "2", "--launch.machines", "2"],
            "with Ray",
        ),
        (["train", "--launch.engine", "horovod"], "launch.engine must be"),
        (["evaluate", "x", "--launch.engine", "ray", "--launch.processes", "2"], "is for `lorica train`"),
    ],
)
def test_refusals(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) in (1, 2)
    assert words in capsys.readouterr().err
