"""Nothing that a folder names is run before its user has said so."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml
from train import tiny

import lorica
from lorica.cli import main
from lorica.compare.file import Comparison
from lorica.errors import ConfigError
from lorica.train import Recipe
from lorica.train.record import Record
from lorica.tune import Space
from lorica.tune.settings import SearchConfig, reopen, settings

CODE = """
from pathlib import Path
from lorica.train.tasks import SequenceClassification

Path(__file__).with_name("ran").touch()

class Task(SequenceClassification):
    name = "of-a-stranger"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose recipe and record were changed to name a file beside them as the task."""
    folder = tmp_path_factory.mktemp("trust")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data")
    options = ["--model", str(folder / "model"), "--data.train", str(folder / "data"), "--method.r", "2"]
    options += ["--training.max_steps", "2", "--training.report_to", "[]", "--output", str(folder / "run")]
    assert main(["train", *options]) == 0
    (folder / "evil.py").write_text(CODE)
    task = f"{folder / 'evil.py'}:Task"
    recipe = yaml.safe_load((folder / "run/recipe.yaml").read_text())
    (folder / "run/recipe.yaml").write_text(yaml.safe_dump({**recipe, "task": task}))
    record = json.loads((folder / "run/run.json").read_text())
    record["recipe"]["task"] = task
    (folder / "run/run.json").write_text(json.dumps(record))
    (folder / "tune").mkdir()
    made = Recipe(task=task)
    (folder / "tune/search.json").write_text(
        settings(made, Space({"method.r": {"choice": [1, 2]}}), SearchConfig())
    )
    comparison = {
        "recipe": {"task": task, "model": str(folder / "model")},
        "tasks": {"one": {"data": {"train": str(folder / "data")}}},
        "methods": {"lora": {"method": {"r": 2}}},
        "seeds": [0],
        "output": str(folder / "compared"),
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(comparison))
    return folder


COMMANDS = [
    "evaluate {0}/run",
    "predict {0}/run lovely",
    "generate {0}/run lovely",
    "merge {0}/model {0}/run -o {0}/merged",
    "merge --stream {0}/model {0}/run -o {0}/merged",
    "train {0}/run/recipe.yaml --output {0}/again",
    "train --config={0}/run/recipe.yaml --output {0}/again",
    "train --from {0}/run/run.json --output {0}/again",
    "train --from {0}/run --output {0}/again --task sequence-classification --config {0}/run/recipe.yaml",
    "tune {0}/run/recipe.yaml --output {0}/search",
    "tune {0}/run/recipe.yaml --ramp --output {0}/search",
    "tune --resume {0}/tune",
    "compare {0}/compare.yaml",
    "compare {0}/compare.yaml --counts",
    "study forget {0}/run --data.train {0}/data",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_folders_task(
    place: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.format(place).split()) == 1
    assert "names Python code as its task" in capsys.readouterr().err.replace("\n", " ")
    assert not (place / "ran").exists()


@pytest.mark.parametrize(
    "command", ["info {0}/run", "compress {0}/run -o {0}/small --rank 1", "study {0}/run --output {0}/page"]
)
def test_what_needs_no_task_asks_nothing(place: Path, command: str) -> None:
    assert main(command.format(place).split()) == 0
    assert not (place / "ran").exists()


@pytest.mark.parametrize(
    "content",
    ["trust_task: true\ntasks: {}\nmethods: {}", "task: a.py:B\ntrust_task: true"],
)
def test_no_file_can_say_it_for_the_user(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    for load in (Comparison.load, Recipe.load):
        with pytest.raises(ConfigError, match="unknown field 'trust_task'"):
            load(tmp_path / "x.yaml")


def test_a_space_names_no_code() -> None:
    for values in (["a.py:B", "regression"], [["a.py"]]):
        with pytest.raises(ConfigError, match="named by the recipe"):
            Space({"task": {"choice": values}})


def test_what_the_user_says_counts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="names Python code"):
        Recipe.load(place / "run/recipe.yaml")
    assert Recipe.load(place / "run/recipe.yaml", trust_task=True).task.endswith("evil.py:Task")
    assert Record.load(place / "run", trust_task=True).recipe.task.endswith("evil.py:Task")
    assert reopen(place / "tune", trust_task=True)[0].task.endswith("evil.py:Task")
    assert not (place / "ran").exists()
    try:
        assert main(["predict", str(place / "run"), "lovely", "--trust_task"]) == 0
        assert (place / "ran").exists()
        typed = ["--task", f"{place / 'evil.py'}:Task", "--output", str(place / "typed")]
        assert main(["train", str(place / "run/recipe.yaml"), *typed]) == 0
    finally:
        (place / "ran").unlink(missing_ok=True)


def test_code_of_a_models_own_is_never_asked_for() -> None:
    """Every model and tokenizer that lorica loads by a name out of a file says so itself."""
    found = 0
    for path in (Path(lorica.__file__).parent).rglob("*.py"):
        if "peft" in path.relative_to(Path(lorica.__file__).parent).parts:
            continue  # its arguments are the caller's
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                options = {keyword.arg: keyword.value for keyword in node.keywords}
                assert ast.unparse(options["trust_remote_code"]) == "False", path
                found += 1
    assert found > 5
