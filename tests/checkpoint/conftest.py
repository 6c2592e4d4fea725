"""A small checkpoint to merge into, and processes that start fast."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import adapter, factors, write_base

from lorica.adapter import Adapter


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, Adapter]:
    """Three shards, of which the adapter touches two; config.json and a tokenizer."""
    shards = [
        {"a.weight": torch.randn(8, 6), "a.bias": torch.randn(8)},
        {"norm.weight": torch.randn(6), "steps": torch.arange(3)},
        {"b.weight": torch.randn(5, 8)},
    ]
    base = write_base(tmp_path / "base", *shards, config={"model_type": "toy"})
    (base / "tokenizer.json").write_text("{}")
    return base, adapter({"a": factors(8, 6), "b": factors(5, 8)})


@pytest.fixture
def server() -> Any:
    """Processes that start in milliseconds, for they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorica.checkpoint.stream"])
    return context
