"""What runs in a process of Ray Tune's: one trial, reported as it goes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica.train.checkpoints import last_checkpoint
from lorica.train.files import writable_directory
from lorica.train.preparing import prepare
from lorica.train.recipe import Recipe
from lorica.train.run import train_prepared
from lorica.tune.base import SharedBase
from lorica.tune.joining import base_of
from lorica.tune.population import LOG, Reporter, write_error

_BASES: dict[str, SharedBase] = {}
"""Bases that this process has opened: Ray gives it one trial after another."""


def train_trial(config: dict[str, Any], *, base: Any, directory: str) -> None:
    """Train, from the newest checkpoint where the trial was begun before.

    An error of the trial's own is reported, not raised: to Ray it would look as if the process had died, and
    be worth another try.

    Args:
        config: the trial's name and recipe.
        base: of the search's recipe, from Ray's object store; None where each trial loads its own.
        directory: folder of all trials, reached by every machine.
    """
    folder = Path(directory) / config["name"]

    def tell(metrics: dict[str, float], step: int, epoch: float, seconds: float) -> bool:
        _say("evaluation", metrics=metrics, step=step, epoch=epoch, seconds=seconds)
        return False

    try:
        writable_directory(folder)
        recipe = _recipe(config["recipe"]).replace(output=str(folder))
        # A trial on another model or other rows loads its own.
        if base is not None and base[0] == base_of(recipe) and recipe.quantization is None:
            prepared = _base(base).prepared(recipe)
        else:
            prepared = prepare(recipe)
        begun = last_checkpoint(folder / "checkpoints") is not None
        with (folder / LOG).open("a", encoding="utf-8") as log:
            result = train_prepared(
                prepared,
                resume=begun,
                overwrite=not begun,
                console=Console(file=log, width=200, no_color=True),
                callbacks=[Reporter(tell)],
                hear_interrupts=False,
            )
    except Exception as error:
        write_error(folder, error)
        _say("failed", error=f"{type(error).__name__}: {error}")
        return
    _say("finished", metrics=result.metrics)


def _say(kind: str, **more: Any) -> None:
    from ray import tune

    # As one string: Ray flattens what is nested, and joins names by slashes.
    tune.report({"said": json.dumps({"kind": kind, **more})})


def _base(shipped: tuple[Any, ...]) -> SharedBase:
    key = shipped[0]
    if key not in _BASES:
        _BASES.clear()
        _BASES[key] = SharedBase.unpacked(shipped)
    return _BASES[key]


def _recipe(text: str) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return Recipe.load(path)
