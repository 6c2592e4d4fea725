"""The tiny model and rows of the training tests, made once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from train import tiny

from lorica.train import Recipe

# Without lorica[tune] none of these can be imported.
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("greenlet") is None else []


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_recipe(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(**training: object) -> Recipe:
        return tiny.recipe(tiny_model, tiny_data, tmp_path / "run", **training)

    return make
