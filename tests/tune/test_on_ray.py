"""Trials in processes of Ray's: few and small, since each costs a process and its imports."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from lorica.errors import ConfigError
from lorica.train import Recipe, train
from lorica.tune import SearchConfig, search
from lorica.tune.shipping import Shipped

ray = pytest.importorskip("ray", reason="needs lorica[tune]")
pytestmark = pytest.mark.filterwarnings("ignore")

TASK = """
import os, signal
from pathlib import Path
from lorica.train.tasks.sequence_classification import SequenceClassification

class Deadly(SequenceClassification):
    name = "deadly"

    def metrics(self, outcome, features):
        try:
            Path({marker!r}).touch(exist_ok=False)
        except FileExistsError:
            return super().metrics(outcome, features)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


def test_a_search_survives_a_killed_process_and_a_failing_trial(
    two_cpus: None, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    task = tmp_path / "task.py"
    task.write_text(TASK.format(marker=str(tmp_path / "killed")))
    recipe = make_recipe(epochs=2, save_steps=3).replace(task=f"{task}:Deadly")
    space = {
        "method.r": {"choice": [1, 2]},
        "method.target_modules": {"choice": [["query", "value"], ["nothing"]]},
    }
    config = SearchConfig(algorithm="grid", scheduler="none", engine="ray", slots=2)
    output = io.StringIO()
    found = search(recipe, space, tmp_path / "s", config, console=Console(file=output, width=200))
    assert (tmp_path / "killed").exists()
    statuses = {record.name: record.status for record in found.records}
    assert statuses == {"000": "finished", "001": "failed", "002": "finished", "003": "failed"}
    assert "nothing" in (found.records[1].error or "")
    for name, r in (("000", 1), ("002", 2)):
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


def test_no_part_imports_ray_train() -> None:
    folder = Path(__file__).resolve().parents[2] / "src" / "lorica" / "tune"
    for path in folder.glob("*.py"):
        assert not re.search(r"ray\.train\b|from ray import .*\btrain\b", path.read_text()), path


def test_a_shipped_model_computes_the_same_and_cannot_be_written_to() -> None:
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = BertForSequenceClassification(config).bfloat16().eval()
    place = "bert.encoder.layer.0.attention.self.query.weight"
    model.classifier = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    model.classifier.weight = model.get_parameter(place)  # tied
    shipped = Shipped.of(model)
    for array, _, _ in shipped.weights:
        array.flags.writeable = False
    there = shipped.model()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(there(ids).logits, model(ids).logits)
    assert there.classifier.weight is there.get_parameter(place)
    assert not any(parameter.requires_grad for parameter in there.parameters())
    assert len(shipped.modules) < 60_000
