"""Whose a parameter is: which adapter brought it, and which adapters train."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn import Parameter

from lorica.layers import AskedModule
from lorica.model.structure import added_modules, walk
from lorica.state import AdapterState


def parameters_of(root: nn.Module, state: AdapterState, name: str) -> Iterator[Parameter]:
    """All parameters that an adapter brought: factors, copies of whole modules, biases, parts."""
    for place in walk(root):
        if isinstance(place.module, AskedModule):
            yield from (parameter for adapter, parameter in place.module.brought() if adapter == name)
    for host in added_modules(root).values():
        if name in host.parts:
            yield from host.parts[name].parameters()
    yield from state.slots.get(name, {}).values()


def in_training(root: nn.Module, state: AdapterState) -> list[str]:
    """The adapters of which anything trains, in the order of arrival."""
    return [
        name
        for name in state.configs
        if any(parameter.requires_grad for parameter in parameters_of(root, state, name))
    ]
