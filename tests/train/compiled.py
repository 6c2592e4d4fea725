"""Trainings with the compiled products of `lorica.kernels`, on layers of any size, and without them."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from lorica.kernels import thin
from lorica.train import Recipe, train

CALLS = ("down", "up", "beside", "back")
"""The compiled products."""


@contextlib.contextmanager
def kernels(*, used: bool) -> Iterator[Counter[str]]:
    """Compute every layer by the compiled products, or none, and count their calls."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        own = getattr(thin, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return own(*args)

        return call

    with contextlib.ExitStack() as patches:
        if not used:
            patches.enter_context(mock.patch.dict("os.environ", {thin.SWITCH: "0"}))
        thin.load.cache_clear()
        assert (thin.load() is not None) is used  # which tries them once
        patches.enter_context(mock.patch.object(thin, "LEAST", 1))
        for name in CALLS:
            patches.enter_context(mock.patch.object(thin, name, counted(name)))
        try:
            yield calls
        finally:
            patches.close()
            thin.load.cache_clear()


def trained(recipe: Recipe, engine: str = "ddp", *, used: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The adapter that a recipe comes to, and how often each compiled product was taken."""
    with kernels(used=used) as calls:
        result = train(recipe, engine=engine, console=Console(file=io.StringIO()))
    return load_file(Path(result.output) / "adapter_model.safetensors"), dict(calls)
