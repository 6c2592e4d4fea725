"""From a configuration of any method, or of several, to what it does to a model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn import Parameter

from lorica.config import AdapterConfig, Combination, LoraConfig, family_of, members, method_of
from lorica.errors import StateError, TargetError, listing
from lorica.layers import Part, Plan, SwappedModule
from lorica.model.adaptable import check_replaceable
from lorica.model.pretrained import Pretrained
from lorica.model.selection import trained_whole, within_any
from lorica.model.structure import Target, base_parameters, walk
from lorica.model.targets import biases, resolve
from lorica.state import AdapterState


@dataclass(frozen=True)
class Resolved:
    """What a configuration does to a model.

    Args:
        config: with what was found written into it.
        lora: the LoRA in it, if there is one.
        layers: modules that get a low-rank update.
        saved: path → module trained whole.
        trained: names of the base's parameters that get a trained copy.
        parts: what is added to modules.
    """

    config: AdapterConfig
    lora: LoraConfig | None
    layers: list[Target]
    saved: dict[str, nn.Module]
    trained: list[str]
    parts: list[Part]


def resolve_methods(root: nn.Module, config: AdapterConfig, seed: int) -> Resolved:
    """Find what a configuration adapts, trains and adds.

    Raises:
        TargetError: a name matches nothing, the architecture cannot take a method, or two methods own one
            parameter.
    """
    lora, others = members(config)
    layers: list[Target] = []
    if lora is not None:
        layers, saved, lora = resolve(root, lora)
    else:
        saved = trained_whole([place for place in walk(root) if place.path], config)
    plan = plan_methods(root, config, saved, seed)
    own_biases = list(biases(root, lora, {t.path for t in layers}, saved)) if lora else []
    trained = [*own_biases, *plan.trained]
    _check_owners(root, trained, layers)
    config = lora if lora and not others else _settled(root, config, lora, saved)
    return Resolved(config, lora, layers, saved, list(dict.fromkeys(trained)), plan.parts)


def plan_methods(root: nn.Module, config: AdapterConfig, saved: Collection[str], seed: int = 0) -> Plan:
    """What the methods besides LoRA do to a model, together.

    Raises:
        TargetError: the architecture cannot take one, or something stands where it is to be added.
    """
    plans = [part.plan(root, saved, seed) for part in members(config)[1]]
    parts = [part for plan in plans for part in plan.parts]
    for part in parts:
        _check_host(part, saved)
    taken = Counter(id(part.module) for part in parts)
    twice = [part.path for part in parts if taken[id(part.module)] > 1]
    if twice:
        raise TargetError(
            f"two of the methods add to {listing(dict.fromkeys(twice))}; make two adapters of them"
        )
    return Plan([name for plan in plans for name in plan.trained], parts)


def trained_by(
    root: nn.Module, config: AdapterConfig, adapted: Container[str], saved: Collection[str]
) -> Iterator[str]:
    """Names of the base's parameters of which a configuration trains a copy.

    Args:
        root: the model.
        config: says which.
        adapted: paths of the modules with a low-rank update.
        saved: paths of the modules trained whole.
    """
    lora, others = members(config)
    if lora is not None:
        yield from biases(root, lora, adapted, saved)
    for other in others:
        yield from other.plan(root, saved, 0).trained


def check_merges(state: AdapterState, names: Iterable[str]) -> None:
    """Refuse to merge what is no change of the base's weights.

    Raises:
        AdapterError: no such adapter.
        StateError: one adds parts to the model.
    """
    for name in names:
        config: AdapterConfig = state.configs[state.known(name)]
        if "additive" in family_of(config):
            parts = config.configs if isinstance(config, Combination) else (config,)
            guilty = listing(method_of(part) for part in parts if family_of(part) == "additive")
            raise StateError(
                f"{name!r} cannot be merged: {guilty} adds to what the model computes, with no place in its "
                "weights; use the adapter as it is"
            )


def _check_host(part: Part, saved: Collection[str]) -> None:
    module = part.module
    free = isinstance(module, part.host | Pretrained) or not isinstance(module, SwappedModule)
    if not free or (within_any(part.path, saved) and part.path):
        raise TargetError(
            f"{part.path or 'the model'} is a {type(module).__name__} for another adapter, and cannot take a "
            f"{part.host.own_modules[0]} beside that; detach the other, or leave this module out of it"
        )
    check_replaceable(part.path or "the model", module)


def _check_owners(root: nn.Module, trained: list[str], layers: list[Target]) -> None:
    if not trained:
        return
    twice = [name for name, times in Counter(trained).items() if times > 1]
    updated: set[Parameter | None] = {
        t.module._parameters.get(t.parameter or t.layer.weight_name) for t in layers
    }
    have = base_parameters(root)
    twice += [name for name in trained if have[name] in updated]
    if twice:
        raise TargetError(f"two of the methods own the same parameter: {listing(twice, limit=5)}")


def _settled(
    root: nn.Module, config: AdapterConfig, lora: LoraConfig | None, saved: dict[str, nn.Module]
) -> AdapterConfig:
    """The configuration as a file should hold it."""
    heads = sorted({path.rpartition(".")[2] for path in saved})
    base = getattr(root, "name_or_path", None) or config.base_model_name_or_path or None
    changes = {
        "modules_to_save": list(dict.fromkeys([*(config.modules_to_save or []), *heads])) or None,
        "base_model_name_or_path": base,
    }
    if isinstance(config, Combination):
        changes["configs"] = tuple(
            dataclasses.replace(
                lora if isinstance(part, LoraConfig) and lora else part, base_model_name_or_path=base
            )
            for part in config.configs
        )
    return config.replace(**changes)
