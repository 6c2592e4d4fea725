"""`lorica init` asks five questions, takes options for answers, and writes a recipe that trains."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from train import tiny

from lorica.cli import main
from lorica.cli.training import init
from lorica.errors import ConfigError
from lorica.train import Recipe


@pytest.mark.parametrize("method", init.METHODS)
def test_every_answer_makes_a_recipe_that_loads(method: str) -> None:
    for task, size in itertools.product(init.TASKS, init.SIZES):
        answers = {"model": "a: b#c", "task": task, "data": "rows #1.csv", "method": method, "size": size}
        text = init.recipe_text(answers, "found: x", "my recipe.yaml")
        recipe = Recipe.from_dict(yaml.safe_load(text))
        assert (recipe.task, recipe.model, recipe.data.train) == (task, "a: b#c", "rows #1.csv")
        assert (recipe.method.r, recipe.method.lora_alpha) == (init.SIZES[size][1], 2 * init.SIZES[size][1])
        assert recipe.method.use_dora == (method == "dora")
        assert (recipe.quantization == "nf4") == (method == "qlora")
        assert recipe.output == "runs/my recipe"


def test_the_tasks_are_those_that_can_be_trained() -> None:
    from lorica.train import tasks

    assert {*init.TASKS} <= {*tasks.names()}


def test_options_answer_and_the_recipe_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.sentences(20))
    given = ["-m", "model", "-t", "sequence-classification", "-d", "rows.jsonl"]
    assert main(["init", *given, "--method", "rslora", "--size", "small"]) == 0
    out = capsys.readouterr().out
    assert out == "wrote recipe.yaml\nnext: lorica data recipe.yaml\nnext: lorica train recipe.yaml\n"
    assert "# found: text → label; 18 train, 2 validation rows" in Path("recipe.yaml").read_text()
    assert main(["train", "recipe.yaml", "--max-steps", "1", "--training.report_to", "[]"]) == 0
    assert Path("runs/recipe/adapter_model.safetensors").is_file()
    assert main(["init", *given]) == 1
    assert "recipe.yaml is there already" in capsys.readouterr().err


def test_where_nobody_can_be_asked_defaults_hold_and_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["init", "--size", "large", "-o", "a.yaml"]) == 0
    out = capsys.readouterr().out
    assert "data: docstrings (--data gives another)" in out
    recipe = Recipe.load("a.yaml")
    assert (recipe.model, recipe.method.r) == (Recipe().model, 64)


def test_a_person_is_asked_what_options_leave_open(capsys: pytest.CaptureFixture[str]) -> None:
    said = iter(["", "7", "rows.csv", "dorra", "dora", "3"])
    found = init.ask({}, lambda prompt: next(said))
    assert found == {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "task": "causal-lm",
        "data": "rows.csv",
        "method": "dora",
        "size": "large",
    }
    out = capsys.readouterr().out
    assert "  7. causal-lm: instructions, conversations, or raw text" in out
    assert "not 'dorra'; did you mean 'dora'" in out

    def gone(prompt: str) -> str:
        raise EOFError

    with pytest.raises(ConfigError, match="the input ended before the question for the model; give --model"):
        init.ask({}, gone)


def test_wrong_answers_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "rows.jsonl", [{"a": 1, "b": 2}])
    assert main(["init", "--task", "causal"]) == 1
    assert "must be one of sequence-classification" in capsys.readouterr().err
    assert (
        main(["init", "-m", "m", "-t", "causal-lm", "-d", "rows.jsonl", "--method", "lora", "--size", "1"])
        == 1
    )
    assert "--data gives other rows" in capsys.readouterr().err
    assert not Path("recipe.yaml").exists()
