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
from lorica.train import Recipe, train
from lorica.train.trainer.checkpoints import STATE


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
