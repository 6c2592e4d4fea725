"""What PEFT refuses or warns of where lorica itself does not, or in other words."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

import lorica
from lorica.config import LoraConfig, full_match, matches_pattern
from lorica.errors import AdapterError, ConfigError, LoricaWarning, StateError, listing
from lorica.layers import TrainedTokens
from lorica.model.selection import ending_in, means_all_linear
from lorica.model.structure import lora_layers, walk
from lorica.model.targets import resolve
from lorica.peft.status import module_type
from lorica.state import AdapterState

_PREFIX = "lora_"


class IdleWarning(LoricaWarning, RuntimeWarning):
    """A part of a configuration asks for something that the model does not have, and does nothing."""


def without_idle(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The configuration without exclusions and keys of patterns that match nothing, as PEFT ignores them.

    Likewise where, of `target_modules` and `target_parameters`, one matches nothing and the other something.

    Args:
        model: the base.
        config: as it was given.

    Raises:
        TargetError: `target_modules` names what the model does not have.

    Warns:
        LoricaWarning: naming each.
    """
    excluded = config.exclude_modules
    if excluded:
        places = [place for place in walk(model) if place.path]
        if isinstance(excluded, str):
            kept = excluded if any(full_match(excluded, place.path) for place in places) else None
        else:
            kept = [name for name in excluded if ending_in(places, [name])]
        if kept != excluded:
            gone = (
                excluded
                if isinstance(excluded, str)
                else listing(n for n in excluded if n not in (kept or ()))
            )
            warnings.warn(
                f"You have passed exclude_modules={excluded!r} but no modules were excluded by {gone}: the "
                "model has none of that name",
                IdleWarning,
                stacklevel=5,
            )
            config = config.replace(exclude_modules=kept or None)
    config = _without_idle_targets(model, config)
    if not config.rank_pattern and not config.alpha_pattern:
        return config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever adapts says it again
        layers = resolve(model, config.replace(rank_pattern={}, alpha_pattern={})).layers
    changes = {}
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field)
        idle = [key for key in pattern if not any(matches_pattern(key, it.pattern_path) for it in layers)]
        if idle:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: "
                f"{sorted(idle)}.",
                IdleWarning,
                stacklevel=5,
            )
            changes[field] = {key: value for key, value in pattern.items() if key not in idle}
    return config.replace(**changes) if changes else config


def _without_idle_targets(model: nn.Module, config: LoraConfig) -> LoraConfig:
    modules, parameters = config.target_modules, config.target_parameters
    if not modules or not parameters or means_all_linear(modules):
        return config
    places = [place for place in walk(model) if place.path]
    if isinstance(modules, str):
        hits = any(full_match(modules, place.path) for place in places)
    else:
        hits = bool(ending_in(places, modules))
    named = [f".{place.path}.{leaf}" for place in places for leaf in place.module._parameters]
    found = any(path.endswith(f".{name}") for path in named for name in parameters)
    if hits == found:
        return config
    idle, what = ("target_modules", "module") if found else ("target_parameters", "parameter")
    given = set(modules) if found and not isinstance(modules, str) else getattr(config, idle)
    warnings.warn(f"{idle}={given} were set but no {what} was matched.", IdleWarning, stacklevel=6)
    return config.replace(**{idle: [] if found else None})


def warn_of_name(name: str) -> None:
    """Say that PEFT confuses an adapter of this name with the prefix of its keys.

    Warns:
        LoricaWarning: it does.
    """
    if name in _PREFIX:
        warnings.warn(
            f"Adapter name '{name}' should not be contained in the prefix '{_PREFIX}'. It works here; PEFT "
            "may start such an adapter anew when it loads it",
            LoricaWarning,
            stacklevel=3,
        )


def warn_of_base(model: nn.Module, config: LoraConfig) -> None:
    """Say that an adapter is for another base than its configuration says.

    Warns:
        LoricaWarning: naming both.
    """
    given, own = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if given and own and given != own:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{given}' to '{own}'. Please "
            "ensure that the correct base model is loaded when loading this checkpoint.",
            LoricaWarning,
            stacklevel=3,
        )


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


def check_alone(root: nn.Module, state: AdapterState, names: Sequence[str]) -> None:
    """Refuse two adapters that each bring the same module whole, or rows of the same table.

    Raises:
        AdapterError: naming them.
    """
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            both = sorted({*state.whole.get(name, ())} & {*state.whole.get(other, ())})
            if both:
                rows = isinstance(root.get_submodule(both[0]), TrainedTokens)
                kind = "TrainableTokensWrapper" if rows else "ModulesToSaveWrapper"
                raise AdapterError(
                    f"Only one adapter can be set at a time for {kind}, got {len(names)}: {name!r} and "
                    f"{other!r} each bring their own {listing(both)}; updates of rank r add up, what is "
                    "trained whole does not"
                )


def check_rows_apart(state: AdapterState, names: Sequence[str]) -> None:
    """Refuse to merge adapters that train the same rows of a table.

    Raises:
        AdapterError: naming the adapters and the table.
    """
    for i, name in enumerate(names):
        for other in names[:i]:
            mine, its = state.whole.get(name, {}), state.whole.get(other, {})
            for path in mine.keys() & its.keys():
                if (mine[path] or frozenset()) & (its[path] or frozenset()):
                    raise AdapterError(
                        f"Token indices of adapter {name} are already defined and would result in undefined "
                        f"merging behavior: {other!r} brings rows of {path} that {name!r} brings too; merge "
                        "one of them"
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
