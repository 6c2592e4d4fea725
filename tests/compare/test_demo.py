from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console
from train import tiny

from lorica.cli import main
from lorica.compare.demo import TRAINING, run_demo, train_row
from lorica.errors import LoricaError
from lorica.train import DataConfig, Recipe, TrainingConfig


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("demo")
    return Recipe(
        model=str(tiny.write_model(folder / "model")),
        data=DataConfig(train=str(tiny.write_data(folder / "data"))),
        training=TrainingConfig(batch_size=4, max_steps=6),
        output=str(folder / "out"),
    )


def test_the_whole_demonstration(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    output = Path(recipe.output)
    demo = run_demo(recipe, Console(file=io.StringIO()))
    frozen, lora, full = demo.rows
    assert [row.method for row in demo.rows] == ["frozen", "lora", "full"]
    assert frozen.trainable_parameters == 2 * 32 + 2
    assert frozen.trainable_parameters < lora.trainable_parameters < full.trainable_parameters
    assert frozen.checkpoint_bytes < lora.checkpoint_bytes < full.checkpoint_bytes
    assert all(row.steps == 6 and row.step_seconds > 0 and row.peak_memory_bytes > 1e8 for row in demo.rows)
    assert demo.logits_difference < 1e-5
    assert demo.same_modules
    results = json.loads((output / "results.json").read_text())
    assert [row["test_accuracy"] for row in results["rows"]] == [row.test_accuracy for row in demo.rows]
    assert sorted(path.name for path in output.iterdir()) == ["adapter", "merged", "results.json"]

    assert len(demo.commands) == 3
    for command in demo.commands:
        program, *arguments = shlex.split(command)
        assert program == "lorica"
        assert main(arguments) == 0, capsys.readouterr().err


def test_data_without_test_rows(recipe: Recipe, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sentences(20))
    with pytest.raises(LoricaError, match="needs test rows"):
        run_demo(
            recipe.replace(data={"train": str(rows)}, output=str(tmp_path / "out")),
            Console(file=io.StringIO()),
        )


@pytest.mark.parametrize("method", TRAINING)
def test_a_row_in_this_process(recipe: Recipe, tmp_path: Path, method: str) -> None:
    row = train_row(method, recipe.replace(output=str(tmp_path)))
    assert row is not None
    assert row.method == method
    assert (tmp_path / "adapter").is_dir() == (method == "lora")
    assert not (tmp_path / f".{method}").exists()
