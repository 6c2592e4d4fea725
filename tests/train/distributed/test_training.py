"""`train`, `evaluate` and `predict` in two processes, against one process that reads both's rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from rich.console import Console
from safetensors.torch import load_file
from train.distributed import work

from lorica.train import Interrupted, train


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return work.write_models(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def one(home: Path) -> dict[str, Any]:
    return work.run_all(str(home))


@pytest.fixture(scope="module")
def two(home: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    return on_ranks(work.run_all, str(home))


@pytest.fixture(scope="module")
def parts(home: Path, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return on_ranks(work.run_in_parts, str(home))


@pytest.mark.parametrize("name", work.CASES)
def test_two_processes_come_to_what_one_comes_to(
    name: str, home: Path, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    alone, (first, second) = one[name], (each[name] for each in two)
    ours, theirs = (work.weights(home, name, where) for where in ("in 2", "in 1"))
    assert ours.keys() == theirs.keys()
    apart = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
    assert apart < 1e-6, apart
    assert first["steps"] == alone["steps"] > 5
    assert first["losses"] == pytest.approx(alone["losses"], abs=5e-6)
    assert first["tokens"] == alone["tokens"]
    assert first["best"] == alone["best"]
    assert first["metrics"] == second["metrics"]
    for split, scores in alone["metrics"].items():
        assert first["metrics"][split] == pytest.approx(scores, rel=1e-6, abs=1e-6), split


@pytest.mark.parametrize("name", work.IN_PARTS)
def test_a_model_in_parts_comes_to_what_whole_ones_come_to(
    name: str, home: Path, two: list[dict[str, Any]], parts: list[dict[str, Any]]
) -> None:
    files = [home / name / where / "adapter_model.safetensors" for where in ("in parts", "in 2")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for own in range(2):
        ours, theirs = parts[own][name], two[own][name]
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
        for what in ("metrics", "losses", "tokens", "best", "chunked", "encoded"):
            assert ours[what] == theirs[what], what
    assert "each of 2 processes holds 1/2 of every weight" in parts[0][name]["printed"]
    assert parts[1][name]["printed"] == ""


def test_a_model_in_parts_writes_what_it_writes_whole(parts: list[dict[str, Any]]) -> None:
    assert [each["written"] for each in parts] == [[True, True]] * 2


def test_evaluation_stops_early_by_the_loss_over_all_targets(two: list[dict[str, Any]]) -> None:
    found = two[0]["language"]
    assert found["best"] < found["steps"] < 40
    assert found["chunked"]
    assert not two[0]["language, all logits"]["chunked"]


def test_one_process_encodes_writes_and_prints(home: Path, two: list[dict[str, Any]]) -> None:
    first, second = (each["five rows left"] for each in two)
    assert (first["encoded"], second["encoded"]) == (1, 0)
    assert "encoding 37 train rows" in first["printed"]
    assert second["printed"] == ""
    folder = home / "five rows left" / "in 2"
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert json.loads((folder / "run.json").read_text())["machine"]["processes"] == 2
    assert "| rows a step | 8 |" in (folder / "README.md").read_text()


def test_scores_and_answers_are_those_of_one_process(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    (first, second), alone = (each["afterwards"] for each in two), one["afterwards"]
    assert first == second
    assert first["scores"] == pytest.approx(alone["scores"], abs=1e-6)
    for ours, theirs in zip(first["answers"], alone["answers"], strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-6)
    assert two[0]["written"] == two[1]["written"] == one["written"]


def test_what_cannot_be_done_is_told_once_and_by_all(home: Path) -> None:
    train(work.steady(home, "whole in one", 8), console=Console(file=io.StringIO()))
    with work.at_step(4, work.interrupt), pytest.raises(Interrupted):
        train(work.steady(home, "begun in one", 8), console=Console(file=io.StringIO()))
    first, second = on_ranks(work.refused, str(home))
    ours, theirs = (
        load_file(home / name / "adapter_model.safetensors") for name in ("begun in one", "whole in one")
    )
    assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) < 1e-6
    for name, message in first.items():
        assert second[name].partition(": ")[2] == message.partition(": ")[2], name
    for name in ("no such column", "no such module"):
        assert second[name].startswith("OnAnother")
    assert "idle" in first["unused"]
    assert "ddp_find_unused_parameters" in first["unused"]
    assert "use_cpu=True" in first["each on its own"]
    assert "auto_batch_size) runs in one process, and this run has 2" in first["searched batch"]
    assert "written by 1 process, and this run has 2" in first["fewer processes"]
    assert "give training.batch_size 4" in first["other rows a step"]
    assert "3 processes (WORLD_SIZE), and its process group has 2" in first["another world"]
