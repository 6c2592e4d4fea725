"""Ramps: one rank after another, each twice the last."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tune.searches import SPACE, Make, silent

from lorica.errors import ConfigError, LoricaError
from lorica.train import Recipe
from lorica.tune import (
    RampConfig,
    ramp,
    search,
)
from lorica.tune.population.population import TrialRunner


def test_the_ramp_ends_where_a_doubling_no_longer_pays(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {1: 0.5, 2: 0.7, 4: 0.8, 8: 0.801, 16: 0.9}
    trained: list[tuple[int, float]] = []
    original = TrialRunner._train

    def pretended(self: Any, name: str, recipe: Recipe, *args: Any, **options: Any) -> Any:
        trained.append((recipe.method.r, recipe.method.lora_alpha))
        goal = self._controller.goal_of(recipe)
        metrics = {"accuracy": scores[recipe.method.r], "parameters": 10.0 * recipe.method.r}
        self._controller.trial_evaluated(name, goal, metrics, 1, 1.0, 0.0)
        return SimpleNamespace(metrics={"validation": metrics})

    monkeypatch.setattr(TrialRunner, "_train", pretended)
    found = ramp(make_recipe(), tmp_path / "ramp", RampConfig(gain=0.01), console=silent())
    assert trained == [(1, 2), (2, 4), (4, 8), (8, 16)]
    assert found.r == 4
    assert "take r=4: r=8 adds less than 0.01" in str(found)
    assert (tmp_path / "ramp" / "ramp.svg").is_file()
    assert ramp(make_recipe(), tmp_path / "ramp", RampConfig(gain=0.01), console=silent()) == found
    assert len(trained) == 4, "ranks that the folder holds are not trained again"
    monkeypatch.setattr(TrialRunner, "_train", original)
    real = ramp(make_recipe(epochs=1, max_steps=1), tmp_path / "b", RampConfig(limit=2), console=silent())
    assert [step.r for step in real.steps] == [1, 2]
    assert real.r in (1, 2)


def test_a_rank_that_fails_is_passed_over_said_and_tried_again(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, broken = {1: 0.9, 2: 0.5, 4: 0.7, 8: 0.7}, {1}
    trained: list[int] = []

    def pretended(self: Any, name: str, recipe: Recipe, *args: Any, **options: Any) -> Any:
        trained.append(recipe.method.r)
        metrics = {"accuracy": scores[recipe.method.r], "parameters": 10.0}
        self._controller.trial_evaluated(name, self._controller.goal_of(recipe), metrics, 1, 1.0, 0.0)
        if recipe.method.r in broken:
            raise RuntimeError("out of memory")
        return SimpleNamespace(metrics={})

    monkeypatch.setattr(TrialRunner, "_train", pretended)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    output = io.StringIO()
    found = ramp(make_recipe(), tmp_path / "r", console=Console(file=output, width=200))
    assert "no figure: matplotlib is not installed" in output.getvalue()
    assert trained == [1, 2, 4, 8]
    assert "r=1 failed: RuntimeError: out of memory; run again to try it again" in str(found)
    assert "take r=4: r=8 adds less than 0.005" in str(found)
    broken.clear()
    found = ramp(make_recipe(), tmp_path / "r", console=silent())
    assert trained == [1, 2, 4, 8, 1]
    assert "take r=1: r=2 adds less than 0.005" in str(found)
    broken |= {2, 4, 8, 16}
    found = ramp(make_recipe(), tmp_path / "last", console=silent())
    assert trained[5:] == [1, 2, 4], "two failures in a row end it"
    assert "take r=1: the largest that could be trained" in str(found)
    broken.add(1)
    assert "no rank could be trained" in str(ramp(make_recipe(), tmp_path / "none", console=silent()))


def test_a_ramp_takes_its_own_trials_alone(make_recipe: Make, tmp_path: Path) -> None:
    recipe, config = make_recipe(epochs=1, max_steps=1), RampConfig(limit=1)
    ramp(recipe, tmp_path / "r", config, console=silent())
    other = recipe.replace(training={"learning_rate": 1e-9})
    with pytest.raises(ConfigError, match=r"started otherwise: recipe\.training\.learning_rate was 0\.01"):
        ramp(other, tmp_path / "r", config, console=silent())
    with pytest.raises(ConfigError, match=r"ramp\.start was 1, now 2"):
        ramp(recipe, tmp_path / "r", RampConfig(start=2), console=silent())
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "search.json").write_text("{}")
    with pytest.raises(LoricaError, match=r"holds trials, but no ramp\.json"):
        ramp(recipe, tmp_path / "s", config, console=silent())
    with pytest.raises(LoricaError, match=r"holds trials, but no search\.json"):
        search(recipe, SPACE, tmp_path / "r", console=silent())
