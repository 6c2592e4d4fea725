"""What the tests of post-training share."""

from __future__ import annotations

from pathlib import Path

import pytest
from train import tiny
from train.post import small


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", small.pairs())


@pytest.fixture(scope="session")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(small.REWARD)
    return path
