"""What opens somebody's account is in no file that a run leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.train import Recipe, train
from lorica.train.recipe import without_secrets
from lorica.tune import SearchConfig, Space
from lorica.tune.settings import settings

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
