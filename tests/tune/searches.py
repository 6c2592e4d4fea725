"""What tests of searches share."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console

from lorica.train import Recipe, train

Make = Callable[..., Recipe]
SPACE = {
    "training.learning_rate": {"loguniform": [1e-6, 3e-2]},
    "method.r": {"choice": [1, 2, 4]},
    "method.lora_alpha": {"tied": "2*r"},
}


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def run_each(recipes: list[Recipe]) -> list[tuple[str, dict[str, Any]]]:
    """Runs of this process's group, and what came out."""
    return [(result.adapter_sha256, result.metrics) for result in map(train, recipes)]
