"""Finding one's way in a model: its modules, those to adapt, its adapted layers, its state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from lorica.errors import StateError, listing
from lorica.layers import AddedModule, LoraLayer, LoraParameters, SavedModule, SwappedModule, TrainedTokens
from lorica.state import AdapterState, uncompiled

STATE = "lorica_state"
"""Attribute of the adapted model that holds its state."""


class Place(NamedTuple):
    """A module, where it stands, and what holds it (None for the model itself)."""

    path: str
    module: nn.Module
    parent: nn.Module | None


class Target(NamedTuple):
    """A module to adapt, and the kind of layer it becomes.

    Args:
        path: of the module.
        module: itself.
        layer: what it becomes.
        parameter: which of its parameters, where that is not the kind's own.
        depth: how many parameters of the module that are adapted too it registered later.
    """

    path: str
    module: nn.Module
    layer: type[LoraLayer]
    parameter: str | None = None
    depth: int = 0

    @property
    def key(self) -> str:
        """Its name in an adapter."""
        return self.path + ".base_layer" * self.depth

    @property
    def pattern_path(self) -> str:
        """What `rank_pattern` and `alpha_pattern` are matched against."""
        return self.path if self.parameter is None else f"{self.path}.{self.parameter}"

    @property
    def anchor(self) -> Tensor | None:
        """The tensor that says on which device the update computes, and how precisely."""
        if self.parameter is not None:
            return self.module._parameters[self.parameter]
        return self.layer.anchor(self.module)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank `r`.

        Raises:
            TargetError: the module cannot carry such an update.
        """
        if self.parameter is not None:
            return LoraParameters.shapes(self.module, self.parameter, r)
        return self.layer.factor_shapes(self.module, r)

    @property
    def weight_path(self) -> str:
        """Name of the weight that the update belongs to."""
        return f"{self.path}.{self.layer.weight_name}"


def walk(root: nn.Module) -> Iterator[Place]:
    """Every module of the base once, in registration order, without what lorica added.

    A module that `torch.compile` wrapped stands under the name of its wrapper.
    """
    seen: set[nn.Module] = set()
    ahead = [Place("", uncompiled(root), None)]
    while ahead:
        place = ahead.pop()
        path, module, _ = place
        if module in seen:
            continue
        seen.add(module)
        yield place
        if module._modules:
            prefix = f"{path}." if path else ""
            added = module.own_modules if isinstance(module, SwappedModule) else ()
            ahead += [
                Place(prefix + name, uncompiled(child), module)
                for name, child in reversed(module._modules.items())
                if child is not None and name not in added
            ]


def base_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by name; one that is tied stands under each of its names."""
    return {
        f"{place.path}.{leaf}" if place.path else leaf: parameter
        for place in walk(root)
        for leaf, parameter in place.module._parameters.items()
        if parameter is not None
    }


def lora_layers(root: nn.Module) -> dict[str, LoraLayer]:
    """Path → adapted layer."""
    return {place.path: place.module for place in walk(root) if isinstance(place.module, LoraLayer)}


def saved_modules(root: nn.Module) -> dict[str, SavedModule]:
    """Path → module with a copy trained whole."""
    return {place.path: place.module for place in walk(root) if isinstance(place.module, SavedModule)}


def added_modules(root: nn.Module) -> dict[str, AddedModule]:
    """Path → module to which adapters add parts of their own."""
    return {place.path: place.module for place in walk(root) if isinstance(place.module, AddedModule)}


def token_modules(root: nn.Module) -> dict[str, TrainedTokens]:
    """Path → module some of whose rows are trained."""
    return {place.path: place.module for place in walk(root) if isinstance(place.module, TrainedTokens)}


def output_head(root: nn.Module) -> nn.Module | None:
    """The output head of a transformers model, if it says so."""
    try:
        return root.get_output_embeddings()  # type: ignore[operator, no-any-return]
    except (AttributeError, NotImplementedError, TypeError):
        return None


def find_adapted(model: nn.Module) -> tuple[nn.Module, AdapterState] | None:
    """The adapted model in `model` and its state: itself, or what a wrapper such as DDP holds.

    Raises:
        StateError: it holds several, each adapted by itself.
    """
    found: dict[str, tuple[nn.Module, AdapterState]] = {}
    seen: set[nn.Module] = set()
    ahead = [("", model)]
    while ahead:
        path, module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        state = module.__dict__.get(STATE)
        if state is not None:  # looking further inside would cost time at every call, and find nothing
            found[path] = module, state
            continue
        prefix = f"{path}." if path else ""
        ahead += [
            (prefix + name, child) for name, child in reversed(module._modules.items()) if child is not None
        ]
    if len(found) > 1:
        raise StateError(
            f"{listing(found)} of this {type(model).__name__} were each adapted by themselves; call this on "
            "each of them, or adapt the whole model in their place"
        )
    return next(iter(found.values()), None)


def adapted(model: nn.Module) -> tuple[nn.Module, AdapterState]:
    """As `find_adapted`, where there must be one.

    Raises:
        StateError: the model carries no adapter, is only a part of the model that does, or holds several.
    """
    found = find_adapted(model)
    if found is not None:
        return found
    if any(isinstance(module, SwappedModule) for module in model.modules()):
        raise StateError(
            f"this {type(model).__name__} is a part of an adapted model; pass the whole model "
            "that was given to lorica.adapt"
        )
    raise StateError(
        f"this {type(model).__name__} carries no adapter; call lorica.adapt or lorica.load first"
    )
