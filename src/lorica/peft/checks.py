"""What PEFT refuses or warns of where lorica itself does not, or in other words."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

import lorica
from lorica.config import LoraConfig
from lorica.errors import AdapterError, ConfigError, LoricaWarning, StateError, listing
from lorica.layers import TrainedTokens
from lorica.model.structure import lora_layers
from lorica.peft.status import module_type
from lorica.roster import Roster


def check_one_bias(config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
    """Refuse a second adapter that trains biases of the base.

    Raises:
        ConfigError: there is one.
    """
    biased = [name for name, other in others.items() if other.bias != "none"]
    if config.bias != "none" and biased:
        raise ConfigError(
            "LoraModel supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' "
            f"for all adapters: {listing(map(repr, biased))} trains biases already (lorica.adapt gives each "
            "adapter biases of its own)"
        )


def check_alone(root: nn.Module, roster: Roster, names: Sequence[str]) -> None:
    """Refuse two adapters that each bring the same module whole, or rows of the same table.

    Raises:
        AdapterError: naming them.
    """
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            both = sorted({*roster.whole.get(name, ())} & {*roster.whole.get(other, ())})
            if both:
                rows = isinstance(root.get_submodule(both[0]), TrainedTokens)
                kind = "TrainableTokensWrapper" if rows else "ModulesToSaveWrapper"
                raise AdapterError(
                    f"Only one adapter can be set at a time for {kind}, got {len(names)}: {name!r} and "
                    f"{other!r} each bring their own {listing(both)}; updates of rank r add up, what is "
                    "trained whole does not"
                )


def warn_of_bias(root: nn.Module, config: LoraConfig, name: str) -> None:
    """Say which layers have no place for the bias on B, once they are merged.

    Warns:
        LoricaWarning: naming each.
    """
    for path, layer in lora_layers(root).items() if config.lora_bias else ():
        if name in layer.scaling and layer._parameters.get("bias") is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {layer.base_class.__name__} has "
                f"no bias. This means that merging LoRA weights won't be possible: {path}",
                LoricaWarning,
                stacklevel=4,
            )


def mixed_rows(root: nn.Module, names: Sequence[str | None]) -> lorica.mixed:
    """As `lorica.mixed`, which says PEFT's name of the layer that cannot take it.

    Raises:
        AdapterError: as `lorica.mixed`.
        StateError: likewise.
    """
    try:
        return lorica.mixed(root, names)
    except StateError as error:
        for layer in lora_layers(root).values():
            if not layer.rows_differ and any(name in layer.scaling for name in names):
                kind = module_type(layer)
                raise StateError(f"{kind} does not support mixed adapter batches yet. {error}") from error
        raise
