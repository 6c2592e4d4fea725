"""What opens somebody's account is in no file that a run leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica import LoraConfig
from lorica.cli import main
from lorica.errors import ConfigError, FileError, LoricaError
from lorica.train import DataConfig, Recipe, TrainingConfig, train
from lorica.train.recipe import without_secrets
from lorica.tune import SearchConfig, Space
from lorica.tune.settings import settings

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe(
        model="some/model",
        data=DataConfig(train="rows.csv", labels=["no", "yes"]),
        method=LoraConfig(r=4, target_modules=["query", "value"], rank_pattern={"query": 2}),
        training=TrainingConfig(learning_rate=3e-5, max_steps=7, arguments={"optim": "adamw_torch"}),
        output="out",
    )
    assert Recipe.load(recipe.save(tmp_path / "recipe.yaml")) == recipe


def test_left_out_fields_keep_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: {r: 2}\ntraining:\n  learning_rate: 1e-4\n")
    recipe = Recipe.load(path)
    assert recipe.method == Recipe().method.replace(r=2)
    assert recipe.training == TrainingConfig(learning_rate=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methd: {r: 2}", "unknown field 'methd'; did you mean 'method'"),
        (
            "training: {learning_rat: 1}",
            "unknown field 'training.learning_rat'; did you mean 'learning_rate'",
        ),
        ("a: 1\nb: 2", "unknown field 'a'; unknown field 'b'"),
        ("training: {batch_size: many}", "batch_size"),
        ("method: {r: 0}", "r must be a whole number of at least 1, not 0"),
        ("training: {warmup_ratio: 1.5}", "warmup_ratio must be a share"),
        ("training: {lr_scheduler: lineer}", "lr_scheduler must be one of"),
    ],
)
def test_wrong_fields_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot read"), ("a: [", "not YAML"), ("- a", "must hold fields"), ("", "must hold fields")],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FileError, match=message):
        Recipe.load(path)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.0},
        {"batch_size": 0},
        {"max_steps": 0},
        {"weight_decay": -1.0},
        {"save_total_limit": 0},
        {"fp16": True, "bf16": True},
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        TrainingConfig(**values)


def test_a_share_of_rows_is_below_one() -> None:
    with pytest.raises(ConfigError, match="validation_fraction"):
        DataConfig(validation_fraction=1.0)


def test_replace_reaches_into_a_part() -> None:
    recipe = Recipe().replace(training={"seed": 3}, output="elsewhere")
    assert recipe.training == dataclasses.replace(TrainingConfig(), seed=3)
    assert recipe.output == "elsewhere"


def test_a_path_is_its_text() -> None:
    recipe = Recipe(
        model=Path("a") / "model",  # type: ignore[arg-type]
        output=Path("runs") / "a",  # type: ignore[arg-type]
        data=DataConfig(train=Path("rows.csv"), test=Path("test.csv")),  # type: ignore[arg-type]
    )
    assert (recipe.model, recipe.output, recipe.data.train) == ("a/model", "runs/a", "rows.csv")
    assert "output: runs/a" in recipe.to_yaml()


@pytest.mark.parametrize("path", RECIPES, ids=[path.name for path in RECIPES])
def test_the_recipes_that_come_along_load(path: Path) -> None:
    assert Recipe.load(path).output.startswith("runs/")


def test_some_recipes_come_along() -> None:
    assert RECIPES


def test_from_what_a_file_would_hold() -> None:
    made = Recipe.from_dict({"task": "regression", "training": {"learning_rate": "1e-3"}, "method": {"r": 3}})
    assert (made.task, made.training.learning_rate, made.method.r) == ("regression", 1e-3, 3)
    for wrong, message in (
        ({"trainin": {}}, "here: unknown field 'trainin'; did you mean 'training'"),
        ({"training": {"epoch": 1}}, "'training.epoch'; did you mean 'epochs'"),
        ({"training": 3}, "here: training must hold fields, not 3"),
        ({"training": {"epochs": "long"}}, "training.epochs"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recipe.from_dict(wrong, "here")


@pytest.mark.parametrize("value", ["9" * 400, 10**310, -(10**310), "1" + "0" * 309])
def test_a_number_that_no_float_holds(
    value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="recipe"):
        Recipe.from_dict({"training": {"learning_rate": value}})
    (tmp_path / "recipe.yaml").write_text(f"training:\n  learning_rate: '{value}'\n")
    with pytest.raises(LoricaError):
        Recipe.load(tmp_path / "recipe.yaml")
    assert main(["train", "--training.learning_rate", str(value)]) == 2
    assert "too large" in capsys.readouterr().err


TOKEN = "hf_" + "SECRET" * 6


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({"hub_token": "x", "run_name": "y"}, {"run_name": "y"}),
        ({"WANDB_API_KEY": "x", "password": "x", "access_key": "x"}, {}),
        ({"a": [f"see {TOKEN}", "https://me:pw@host/x"]}, {"a": ["see ", "https://host/x"]}),
        ({"max_tokens": 3, "token": 5, "tokenizer": "x", "separator": "<s>"}, ...),
    ],
)
def test_what_is_secret_by_name_or_form_is_left_out(value: Any, kept: Any) -> None:
    assert without_secrets(value) == (value if kept is ... else kept)


def test_a_recipe_keeps_it_to_itself(tmp_path: Path) -> None:
    recipe = Recipe.from_dict({"training": {"arguments": {"hub_token": "secret", "run_name": "x"}}})
    assert recipe.training.arguments["hub_token"] == "secret"
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml").training.arguments == {"run_name": "x"}
    text = settings(recipe, Space({"method.r": {"choice": [1, 2]}}), SearchConfig())
    assert "secret" not in text
    assert "run_name" in text


def test_no_file_of_a_run_holds_it(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(max_steps=2, arguments={"hub_token": TOKEN}, report_to=["tensorboard"])
    result = train(recipe)
    files = [path for path in result.output.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    with pytest.raises(Exception, match="holds a run already"):
        train(recipe)
    assert train(recipe, resume=True).adapter_sha256 == result.adapter_sha256
