"""Settings made in Python: a value of another type is refused by its field's name, as in a file."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import lorica
from lorica.errors import ConfigError
from lorica.train import DataConfig, GenerationConfig, LaunchConfig, Recipe, TrainingConfig
from lorica.train.settings import PostConfig
from lorica.tune import RampConfig, SearchConfig

ODD = [None, "", "x", 0, -1, 0.5, float("nan"), float("inf"), True, [], ["x"], [None], {}, {"x": 1}, b"a", 1j]
ODD += [object(), 10**400, (1, 2)]
SETTINGS = [
    *(DataConfig, TrainingConfig, GenerationConfig, PostConfig, LaunchConfig, Recipe, SearchConfig),
    *(RampConfig, lorica.AdapterHConfig, lorica.PreLayerConfig, lorica.TopConfig, lorica.BitFitConfig),
    *(lorica.EvaConfig, lorica.CordaConfig, lorica.LoraGAConfig, lorica.LoftQConfig),
]


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_whatever_comes_is_taken_or_refused_by_name(kind: type[Any]) -> None:
    for field in dataclasses.fields(kind):
        for value in ODD:
            try:
                kind(**{field.name: value})
            except lorica.LoricaError:
                continue
            assert not isinstance(value, (bytes, complex)), (field.name, value)
            assert value == value, field.name  # not NaN
            assert str(value) != "inf", field.name


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (TrainingConfig, {"batch_size": 0.5}, "training.batch_size must be a whole number, not 0.5"),
        (TrainingConfig, {"batch_size": "16"}, "training.batch_size must be a whole number, not '16'"),
        (TrainingConfig, {"learning_rate": float("inf")}, "learning_rate must be a number or None, not inf"),
        (TrainingConfig, {"epochs": True}, "training.epochs must be a number or None, not True"),
        (TrainingConfig, {"report_to": "wandb"}, "report_to must be a list, each item a text, not 'wandb'"),
        (DataConfig, {"columns": ["a", 1]}, r"data.columns must be a list, each item a text or None, not \["),
        (DataConfig, {"streaming": "no"}, "data.streaming must be True or False, not 'no'"),
        (PostConfig, {"rewards": "reward.py:f"}, "post.rewards must be a list, each item a text"),
        (Recipe, {"training": {"seed": 1}}, "training must be a TrainingConfig, not {'seed': 1}"),
        (
            SearchConfig,
            {"resources": {"cpu": "2"}},
            "resources must be a mapping, each value a number",
        ),
    ],
)
def test_the_message(kind: type[Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**given)
