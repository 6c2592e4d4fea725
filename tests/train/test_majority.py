from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from train import tiny

from lorica.train import Fit, Recipe, train


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


def doubts(history: list[dict[str, float]], *, fp16: bool = False) -> list[str]:
    trainer: Any = SimpleNamespace(args=SimpleNamespace(fp16=fp16))
    nothing: Any = None
    return list(Fit(nothing, trainer, 9, 1.0, None, history, nothing).doubts())


def test_a_loss_that_rose_or_was_no_number_is_warned_of() -> None:
    level: list[dict[str, float]] = [{"loss": 0.7, "grad_norm": 1.0}, {"eval_loss": 0.7}] * 5
    assert doubts(level) == []
    assert doubts([]) == []
    (said,) = doubts([*level, *[{"loss": 3.0, "grad_norm": 9.0}] * 3])
    assert said.startswith("the training loss rose from 0.7000 to 3.0000: training diverged")
    (said,) = doubts([*level, {"loss": 0.7, "grad_norm": math.nan}])
    assert "was not a number at times: training diverged; take a lower learning_rate" in said
    # A scaler of float16 tries its scale out.
    assert doubts([*level, {"loss": 0.7, "grad_norm": math.inf}], fp16=True) == []


def test_a_run_that_learns_is_not_warned_of(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(epochs=15, load_best=False, learning_rate=3e-3)
    assert train(recipe.replace(method={"r": 8, "lora_alpha": 16, "lora_dropout": 0.0})).warnings == []
