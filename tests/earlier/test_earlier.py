"""What version 0.1.0 wrote is read as it was meant: adapters, checkpoints, runs, searches and comparisons.

`files/` was made by make.py at that version and stays as it is, as do the files on users' disks.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from earlier.make import ADAPTERS, base
from rich.console import Console
from safetensors.torch import load_file
from tiny import outputs, transformer

import lorica
from lorica.checkpoint.loralib import read as read_loralib

FILES = Path(__file__).with_name("files")


def model_of(name: str) -> Any:
    """The base of an adapter, with the weights that it had."""
    architecture, settings, _ = ADAPTERS[name]
    model = transformer(architecture, **settings)
    model.load_state_dict(load_file(FILES / "bases" / f"{base(architecture, settings)}.safetensors"))
    return model


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder in which things were made, as the current folder."""
    shutil.copytree(FILES / "work", tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_what_it_did(name: str) -> None:
    expected = load_file(FILES / "outputs.safetensors")[name]
    model = lorica.load(model_of(name), FILES / "adapters" / name)
    torch.testing.assert_close(outputs(model, ADAPTERS[name][0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_written_again_with_the_same_keys_and_values(name: str, tmp_path: Path) -> None:
    model = lorica.load(model_of(name), FILES / "adapters" / name)
    lorica.save(model, tmp_path)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, FILES / "adapters" / name)
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    assert lorica.read(tmp_path).config == lorica.read(FILES / "adapters" / name).config


@pytest.mark.parametrize("name", ADAPTERS)
def test_training_can_go_on_from_an_adapter(name: str) -> None:
    architecture, _, config = ADAPTERS[name]
    expected = load_file(FILES / "outputs.safetensors")[name]
    model = lorica.adapt(model_of(name), config, seed=0)
    lorica.load_weights(model, FILES / "adapters" / name)
    torch.testing.assert_close(outputs(model, architecture), expected, rtol=1e-5, atol=1e-5)


def test_a_killed_run_goes_on_to_the_weights_it_would_have_had(work: Path) -> None:
    from lorica.train import Recipe, train

    train(Recipe.load("killed/recipe.yaml"), resume=True, console=silent())
    ours, theirs = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("killed", "run"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_a_run_is_evaluated_and_predicts(work: Path) -> None:
    from lorica.train import evaluate, predict

    noted = json.loads(Path("run/run.json").read_text())["results"]["metrics"]["test"]
    scores = evaluate("run")
    assert {k: scores[k] for k in noted} == pytest.approx(noted, abs=1e-5)
    assert [p["label"] for p in predict("run", ["lovely film", "awful plot"])]


def test_a_run_can_be_repeated_from_its_record(work: Path) -> None:
    from lorica.cli import main

    assert main(["train", "--from", "run/run.json", "--output", "repeated"]) == 0
    ours, theirs = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("repeated", "run"))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_a_search_goes_on_with_the_trials_that_it_had(work: Path) -> None:
    pytest.importorskip("greenlet", reason="needs lorica[tune]")
    from lorica.tune import reopen, search

    recipe, space, config = reopen("search")
    found = search(recipe, space, "search", replace(config, trials=3), resume=True, console=silent())
    assert [record.name for record in found.records] == ["000", "001", "002"]
    first = json.loads(Path("search/results.jsonl").read_text().splitlines()[0])
    assert found.records[0].values == first["values"]


def test_a_comparison_is_read_and_runs_nothing_anew(work: Path) -> None:
    from lorica.compare.file import Comparison
    from lorica.compare.loop import compare, gather

    spec = Comparison.load(Path("compare.yaml"))
    lines = Path("comparison/results.jsonl").read_text()
    table = gather(spec)
    assert compare(spec, console=silent(), in_process=True) == table
    assert Path("comparison/results.jsonl").read_text() == lines


def test_a_checkpoint_of_loralib() -> None:
    state = torch.load(FILES / "loralib.pt", weights_only=True)
    adapter = read_loralib(FILES / "loralib.pt", lora_alpha=4)
    assert adapter.factors.keys() == {"0", "2"}
    for path, factors in adapter.factors.items():
        assert torch.equal(factors.A, state[f"{path}.lora_A"])
        assert torch.equal(factors.B, state[f"{path}.lora_B"])
        assert factors.scale == 2.0
