from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lorica.errors import ConfigError, FileError
from lorica.train import DataConfig, Recipe, presets
from lorica.tune import Space
from lorica.tune.expression import Expression
from lorica.tune.space import documents

Make = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2*r", 16),
        ("-r + 2 ** 3", 0),
        ("max(r // 3, sqrt(4)) % 3", 2),
        ("method.r / 4", 2.0),
        ("(learning_rate + r) * 0", 0),
    ],
)
def test_expressions(text: str, value: float) -> None:
    fields = {"method.r": 8, "training.learning_rate": 0.1}
    assert Expression(text).value(fields) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2*", "cannot be read"),
        ("__import__('os')", "it may hold numbers, fields"),
        ("[r for r in (1,)]", "it may hold numbers"),
        ("'8'", "it may hold numbers"),
        ("r if r else 1", "it may hold numbers"),
        ("r.__class__()", "it may hold numbers"),
        ("min(r, key=r)", "it may hold numbers"),
        ("rr", "no field of a recipe: 'rr'; did you mean 'r'"),
        ("model", "needs a number, and model is 'x'"),
        ("1 / (r - 8)", "has no value: division by zero"),
    ],
)
def test_expressions_are_arithmetic_and_nothing_else(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Expression(text).value({"method.r": 8, "model": "x"})


def test_a_name_that_could_be_two_fields_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"may be a\.r or b\.r; write it in full"):
        Expression("r").value({"a.r": 1, "b.r": 2})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method.rank": {"choice": [1]}}, "no field of a recipe: 'method.rank'"),
        ({"training": {"learnin_rate": {"uniform": [0, 1]}}}, "did you mean 'training.learning_rate'"),
        ({"method.r": {"choice": []}}, "choice needs a list of at least one value, not \\[\\]"),
        ({"method.r": {"choise": [1]}}, "no 'choise'; did you mean 'choice'"),
        ({"learning_rate": {"uniform": [1e-2, 1e-3]}}, "lowest end first"),
        ({"learning_rate": {"uniform": [1, 1]}}, "lowest end first"),
        ({"learning_rate": {"loguniform": [0, 1]}}, "ends above 0"),
        ({"learning_rate": {"loguniform": ["1e-5", 1]}}, "YAML reads 1e-5 as text: write 1.0e-5"),
        ({"method.r": {"integer": [1.5, 4]}}, "the ends of integer must be numbers"),
        ({"method.r": {"uniform": [1]}}, "its two ends, \\[lowest, highest\\]"),
        ({"method.r": {"choice": [1], "uniform": [1, 2]}}, "expected one of"),
        ({"method.lora_alpha": {"tied": "import os"}}, "cannot be read"),
        ({"output": {"choice": ["a"]}}, "each trial's own folder"),
        ({"load_best": False, "r": {"choice": [1]}}, r"training\.load_best cannot be in a space; it is on"),
        ({"metric_for_best": {"choice": ["loss", "f1"]}}, "give metric and mode to the search"),
        ({"r": {"choice": [1]}, "method.r": {"choice": [2]}}, r"method\.r: method\.r is in the space twice"),
        ({"method.r": 4}, "nothing to search"),
        ({}, "nothing to search"),
    ],
)
def test_what_cannot_be_searched_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Space(fields)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Space({"method.rank": 1, "method.r": {"choice": []}})
    assert "method.rank" in str(caught.value)
    assert "choice needs a list" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method.r": {"choice": [4, 0]}}, "method.r = 0: "),
        ({"method.r": {"uniform": [1.0, 4.0]}}, "a whole number: search it by choice or integer"),
        ({"method.r": {"choice": [True]}}, "method.r = True: expected int"),
        ({"learning_rate": {"choice": [1e-3, "1e-4"]}}, "write 1.0e-5"),
        ({"seed": "3", "r": {"choice": [1]}}, "training.seed = '3': expected int"),
        ({"save_steps": 2.5, "r": {"choice": [1]}}, "save_steps = 2.5: expected int or None"),
        ({"learning_rate": "1e-5", "r": {"choice": [1]}}, "expected float or None; YAML reads 1e-5 as text"),
        ({"training.lr_scheduler": {"choice": ["linear", "square"]}}, "lr_scheduler = 'square': "),
        ({"method.r": {"choice": [3]}, "method.lora_alpha": {"tied": "r", }, "batch_size": {"tied": "r / 2"}},
         "batch_size is a whole number, and its expression comes to 1.5"),
        ({"method.r": {"choice": [3]}, "epochs": {"tied": "batch_size"}, "batch_size": {"tied": "epochs"}},
         "in a circle"),
    ],
)  # fmt: skip
def test_what_no_recipe_can_be_is_refused(make_recipe: Make, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Space(fields).check(make_recipe())


def test_a_default_that_a_preset_replaces_is_refused() -> None:
    recipe = presets.apply(Recipe(data=DataConfig(preset="glue/cola")))
    fields = {"data.text": {"choice": ["sentence", None]}, "method.r": {"choice": [1]}}
    with pytest.raises(ConfigError, match=r"data\.text = None: left at its default, it becomes 'sentence'"):
        Space(fields).check(recipe)


def test_values_reach_the_recipe_and_ties_follow(make_recipe: Make) -> None:
    space = Space(
        {
            "method": {"r": {"choice": [4, 8]}, "lora_alpha": {"tied": "2*r"}},
            "training.batch_size": {"tied": "lora_alpha / 2"},
            "training.epochs": 1,
            "training.report_to": [],
            "training.arguments": {"value": {"adam_beta2": 0.98}},
            "data.labels": None,
            "method.target_modules": {"choice": [["query"], "all-linear"]},
        }
    )
    made = space.recipe(make_recipe(), {"method.r": 8, "method.target_modules": ["query"]})
    assert (made.method.r, made.method.lora_alpha, made.training.batch_size) == (8, 16, 8)
    assert (made.training.epochs, made.training.learning_rate) == (1, 1e-2)
    assert made.method.target_modules == ["query"]
    space.check(make_recipe())
    assert [len(list(space.grid())), len(space.searched)] == [4, 2]
    with pytest.raises(ConfigError, match="lora_dropout is a range; list values to try"):
        list(Space({"lora_dropout": {"uniform": [0, 1]}, "r": {"choice": [1]}}).grid())


def test_tuples_are_lists() -> None:
    """A search that is resumed reads its space and its trials from JSON."""
    made = Space(
        {"method.target_modules": {"choice": (("query",), ("query", "value"))}, "r": {"integer": (1, 4)}}
    )
    assert made.dimensions == Space(json.loads(json.dumps(written(made)))).dimensions
    assert made.draw(Random(0))["method.target_modules"] in (["query"], ["query", "value"])


def written(space: Space) -> dict[str, Any]:
    return {name: {d.kind: d.given} for name, d in space.dimensions.items()}


def test_draws_stay_inside_and_are_spread() -> None:
    space = Space(
        {
            "learning_rate": {"loguniform": [1e-5, 1e-1]},
            "lora_dropout": {"uniform": [0.1, 0.5]},
            "r": {"integer": [2, 4]},
            "weight_decay": {"choice": [0.0, 0.1]},
        }
    )
    random = Random(0)
    drawn = [space.draw(random) for _ in range(2000)]
    rates = [math.log10(values["training.learning_rate"]) for values in drawn]
    assert min(rates) >= -5
    assert max(rates) <= -1
    assert sum(rates) / len(rates) == pytest.approx(-3, abs=0.1)
    drops = [values["method.lora_dropout"] for values in drawn]
    assert min(drops) >= 0.1
    assert max(drops) <= 0.5
    assert sum(drops) / len(drops) == pytest.approx(0.3, abs=0.01)
    assert {values["method.r"] for values in drawn} == {2, 3, 4}
    assert {values["training.weight_decay"] for values in drawn} == {0.0, 0.1}


def test_the_documents_space(make_recipe: Make) -> None:
    space = documents("q_lin", "v_lin")
    given = {name: (d.kind, d.given) for name, d in space.dimensions.items()}
    assert given == {
        "training.learning_rate": ("loguniform", [1e-4, 1e-1]),
        "method.r": ("choice", [2, 4, 6, 8, 10, 16]),
        "method.lora_alpha": ("tied", "r"),
        "method.target_modules": ("choice", [["q_lin"], ["v_lin"], ["q_lin", "v_lin"]]),
        "method.lora_dropout": ("uniform", [0.1, 0.5]),
    }
    space.check(make_recipe())
    # The file that comes along says the same, and trains as long as the rungs are.
    folder = Path(__file__).parents[2] / "recipes"
    written = Space.load(folder / "spaces" / "tutorials.yaml")
    written.check(Recipe.load(folder / "sentiment.yaml"))
    assert written.dimensions.pop("training.epochs").given == 10
    assert written.dimensions == documents().dimensions


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("method.r: {choice: [4, 8]}\ntraining:\n  learning_rate: {loguniform: [1.0e-5, 0.1]}\n")
    assert list(Space.load(path).searched) == ["method.r", "training.learning_rate"]
    with pytest.raises(FileError, match="cannot read the space"):
        Space.load(tmp_path / "other.yaml")
    path.write_text("[")
    with pytest.raises(FileError, match="is not YAML"):
        Space.load(path)
    path.write_text("- a")
    with pytest.raises(FileError, match="must hold fields"):
        Space.load(path)
