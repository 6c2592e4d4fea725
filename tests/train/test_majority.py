from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from train import tiny

from lorica.train import Recipe, train


def skewed(folder: Path) -> Path:
    """Rows of which three in four are good, and test rows of which one in four is."""
    for split, good, bad in (("train", 30, 10), ("validation", 9, 3), ("test", 3, 9)):
        rows = [r for r in tiny.sentences(80) if r["label"] == "good"][:good]
        rows += [r for r in tiny.sentences(80) if r["label"] == "bad"][:bad]
        tiny.write_rows(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def lines(make_recipe: Callable[..., Recipe], tmp_path: Path) -> tuple[list[str], Path]:
    console = Console(file=io.StringIO(), width=300)
    recipe = make_recipe(learning_rate=1e-9, max_steps=2, eval_steps=1)
    recipe = recipe.replace(data={"train": str(skewed(tmp_path / "rows"))})
    output = train(recipe, console=console).output
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines(), output


def test_the_score_to_beat_stands_beside_each_result(lines: tuple[list[str], Path]) -> None:
    said, output = lines
    results = json.loads((output / "run.json").read_text())["results"]
    assert results["majority"]["validation"]["accuracy"] == 0.75
    assert results["majority"]["test"]["accuracy"] == 0.25
    assert results["majority"]["test"]["matthews"] == 0.0
    evaluated = [line for line in said if "validation: accuracy" in line]
    assert len(evaluated) == 2
    assert all("(largest class 0.7500)" in line for line in evaluated)


def test_one_class_for_all_rows_is_warned_of(lines: tuple[list[str], Path]) -> None:
    said, output = lines
    warnings = json.loads((output / "run.json").read_text())["results"]["warnings"]
    assert any("all 12 validation rows are called" in line for line in warnings)
    assert any("all 12 test rows are called" in line for line in warnings)
    assert sum(line.startswith("warning: all 12") for line in said) == 2


def test_a_loss_that_rises_is_warned_of(make_recipe: Callable[..., Recipe]) -> None:
    result = train(make_recipe(learning_rate=5.0, logging_steps=1, load_best=False, max_grad_norm=0))
    assert any("training diverged; take a lower learning_rate" in line for line in result.warnings)


def test_a_run_that_learns_is_not_warned_of(make_recipe: Callable[..., Recipe]) -> None:
    assert train(make_recipe()).warnings == []
