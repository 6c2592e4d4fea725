"""PEFT's helpers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lorica.errors import ConfigError, ConfigTypeError, FileError, StateError
from lorica.layers import lora_layers
from lorica.peft.config import PeftConfig
from lorica.state import find_adapted


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """A context in which all updates are multiplied by a number.

    Args:
        model: wrapped or not.
        multiplier: 0 is the base, 1 the adapter; values between them interpolate, as in WiSE-FT (Wortsman et
            al., 2021).

    Raises:
        ConfigTypeError: the multiplier is not a number.
        StateError: the model carries no adapter, or one is merged.
    """
    if not isinstance(multiplier, (float, int)):
        raise ConfigTypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    found = find_adapted(model)
    if found is None:
        raise StateError("scaling is only supported for models with `LoraLayer`s, and this one has none")
    root, state = found
    state.check_unmerged("rescale updates")
    before = {layer: layer.scaling for layer in lora_layers(root).values()}
    for layer, scaling in before.items():
        layer.scaling = {name: scale * multiplier for name, scale in scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in before.items():
            layer.scaling = scaling


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this name leads to a LoRA adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (FileError, ConfigError):
        return False
    return True


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Accepted without effect: inputs are never cast up to the adapter's precision."""
    yield


class DoraCaching:
    """Accepted without effect: DoRA's norms are computed from thin products.

    ``DoraCaching()(enabled=True)`` for good, or ``with DoraCaching():``.
    """

    def __call__(self, enabled: bool = True) -> None:
        """Nothing to do."""

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, *error: object) -> None:
        """Nothing to undo."""
