"""A damaged checkpoint is named before anything goes on from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.errors import FileError
from lorica.train import Recipe, last_checkpoint, train
from lorica.train.trainer.checkpoints import STATE, discard_incomplete, find_best, is_complete


def checkpoint(folder: Path, step: int, *, state: str | None = None, without: str = "") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"):
        if name != without:
            (path / name).write_text("")
    if without != "trainer_state.json":
        (path / "trainer_state.json").write_text(
            json.dumps({"global_step": step}) if state is None else state
        )
    return path


def test_the_newest_whole_one(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, without="trainer_state.json")
    checkpoint(tmp_path, 12, state='{"global_step": ')
    checkpoint(tmp_path, 13, state='{"global_step": 5}')
    checkpoint(tmp_path, 14, without="adapter_model.safetensors")
    checkpoint(tmp_path, 15, without="optimizer.pt")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert last_checkpoint(tmp_path) == newest
    assert {path.name for path in discard_incomplete(tmp_path)} == {f"checkpoint-{i}" for i in range(11, 16)}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-99",
        "checkpoint-best",
    ]


def test_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    assert not is_complete(tmp_path)


def test_the_best_is_found_again_after_a_move(tmp_path: Path) -> None:
    best = checkpoint(tmp_path / "new", 5)
    state = json.dumps({"global_step": 10, "best_model_checkpoint": str(tmp_path / "old" / "checkpoint-5")})
    last = checkpoint(tmp_path / "new", 10, state=state)
    find_best(last)
    assert json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    find_best(best)
    assert json.loads((best / "trainer_state.json").read_text()) == {"global_step": 5}


@pytest.fixture
def stopped(make_recipe: Callable[..., Recipe]) -> tuple[Recipe, Path]:
    """A run that was killed between two checkpoints; the recipe, and the checkpoint."""
    recipe = make_recipe(max_steps=4, save_steps=2, eval_steps=2, save_total_limit=3)
    output = train(recipe).output
    shutil.rmtree(output / "checkpoints" / "checkpoint-4")
    for name in ("adapter_config.json", "run.json"):
        (output / name).unlink()
    return recipe, output / "checkpoints" / "checkpoint-2"


def other_shapes(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    for moments in state["state"].values():
        moments["exp_avg"] = torch.zeros(3, 3)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        (
            "optimizer.pt",
            lambda path: path.write_bytes(b"nonsense"),
            "the optimizer's or the schedule's file",
        ),
        ("optimizer.pt", lambda path: path.write_bytes(path.read_bytes()[:-500]), "the optimizer's"),
        ("optimizer.pt", lambda path: torch.save({"state": 3}, path), "the optimizer's"),
        ("optimizer.pt", other_shapes, "the optimizer's"),
        ("scheduler.pt", lambda path: path.write_bytes(b""), "the optimizer's or the schedule's file"),
        ("rng_state.pth", lambda path: path.write_bytes(b"nonsense"), "the file of random states"),
    ],
)
def test_a_damaged_file(
    stopped: tuple[Recipe, Path], file: str, harm: Callable[[Path], Any], message: str
) -> None:
    recipe, checkpoint = stopped
    harm(checkpoint / file)
    with pytest.raises(FileError, match=f"checkpoint-2 cannot be resumed from: {message}"):
        train(recipe, resume=True)
    assert checkpoint.is_dir()
    shutil.rmtree(checkpoint)  # as the message says
    assert train(recipe, resume=True).steps == 4


@pytest.mark.parametrize(
    "change",
    [
        {"max_steps": "x"},
        {"log_history": {"a": 1}},
        {"log_history": [3]},
        {"best_metric": []},
        {"stateful_callbacks": {"TrainerControl": 3}},
        {"best_model_checkpoint": 7},
        {"unknown": 1},
        {"epoch": "one"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_damaged_state(stopped: tuple[Recipe, Path], change: dict[str, Any]) -> None:
    recipe, checkpoint = stopped
    state = json.loads((checkpoint / STATE).read_text())
    (checkpoint / STATE).write_text(json.dumps({**state, **change}))
    with pytest.raises(
        FileError, match=r"checkpoint-2 cannot be resumed from: trainer_state\.json is damaged"
    ):
        train(recipe, resume=True)
