"""What tests of searches share."""

from __future__ import annotations

import io
from collections.abc import Callable

from rich.console import Console

from lorica.train import Recipe

Make = Callable[..., Recipe]
SPACE = {
    "training.learning_rate": {"loguniform": [1e-6, 3e-2]},
    "method.r": {"choice": [1, 2, 4]},
    "method.lora_alpha": {"tied": "2*r"},
}


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)
