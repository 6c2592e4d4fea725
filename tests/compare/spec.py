"""A comparison of tiny things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from train import tiny

from lorica.compare.file import Comparison

METHODS: dict[str, Any] = {
    "BitFit": {"baseline": {"method": "bitfit"}, "learning_rates": [1e-2, 3e-2]},
    "LoRA": {"method": {"r": 2, "target_modules": "all-linear"}, "training": {"learning_rate": 2e-2}},
}


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """What the file holds: two methods on one task, two seeds, a model and rows in `folder`."""
    if not (folder / "model").exists():
        tiny.write_model(folder / "model")
        tiny.write_data(folder / "rows")
    training = {"epochs": 1, "batch_size": 8, "report_to": [], "load_best": False}
    return {
        "recipe": {"model": str(folder / "model"), "training": training},
        "tasks": {"mood": {"task": "sequence-classification", "data": {"train": "rows"}}},
        "methods": METHODS,
        "seeds": [0, 1],
        "data": str(folder),
        "output": str(folder / "out"),
        **changes,
    }


def spec(folder: Path, **changes: Any) -> Comparison:
    """The comparison."""
    return Comparison.from_dict(content(folder, **changes))


def write(folder: Path, **changes: Any) -> Path:
    """The comparison as a file."""
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(content(folder, **changes), sort_keys=False))
    return path
