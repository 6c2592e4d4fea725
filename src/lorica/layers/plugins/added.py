"""Modules to which an adapter adds a part of its own: a bottleneck, a prefix.

module ──take──▶ module + {adapter name: part}         the part changes what goes in, or what comes out
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.layers.swapped import SwappedModule, blank

P = TypeVar("P", bound=nn.Module)


class AddedModule(SwappedModule):
    """A module with a part per adapter; the active adapter's part acts.

    Subclasses name the one container of parts in `own_modules`, and act by `acting_part`.
    """

    # Libraries look up what a block or a model is by its class's name.
    label: ClassVar[str] = ""
    in_whole: ClassVar[str] = "another adapter adapts {} in it"

    @classmethod
    def refusal(cls) -> str:  # noqa: D102
        return (
            f" carries a part that another method added ({cls.swapped_by.__name__}) and cannot take a "
            "low-rank update beside that; leave it out"
        )

    def prepare(self) -> None:  # noqa: D102
        self._modules[self.own_modules[0]] = blank(nn.ModuleDict)

    @property
    def parts(self) -> nn.ModuleDict:
        """Adapter name → its part."""
        parts = self._modules[self.own_modules[0]]
        assert isinstance(parts, nn.ModuleDict)
        return parts

    def acting_part(self, kind: type[P]) -> P | None:
        """The active adapter's part; None if the module acts alone."""
        # At most one: the state lets no two adapters act that add a part to the same module.
        for name in self.adapter_state.active:
            if name in self.parts:
                part = self.parts[name]
                assert isinstance(part, kind)
                return part
        return None

    def add_part(self, name: str, part: nn.Module) -> None:
        """Add an adapter's part."""
        self.parts[name] = part

    def remove_part(self, name: str) -> None:
        """Remove an adapter's part."""
        del self.parts[name]


@contextmanager
def without_outermost(module: nn.Module) -> Iterator[None]:
    """Take the outermost class off a module for the length of a block, so that another can join or leave."""
    mixin = type(module).swapped_by if isinstance(module, SwappedModule) else None
    if mixin is None or not mixin.outermost:
        yield
        return
    # Not `leave()`, which would take off the other host's modules.
    module.__class__ = type(module).base_class  # type: ignore[attr-defined]
    try:
        yield
    finally:
        mixin.swap(module)


class Part(NamedTuple):
    """A part that an adapter adds to one module of the base.

    Args:
        path: the module's path.
        module: the module.
        host: the class that the module takes.
        part: the part, at its start.
    """

    path: str
    module: nn.Module
    host: type[AddedModule]
    part: nn.Module

    @property
    def place(self) -> str:
        """The part's path in the model, without the adapter's name."""
        return join(self.path, self.host.own_modules[0])

    def tensors(self) -> Iterator[tuple[str, Parameter]]:
        """The part's parameters, by their names in an adapter."""
        for leaf, parameter in self.part.named_parameters():
            yield join(self.place, leaf), parameter


@dataclass(frozen=True)
class Plan:
    """The changes that a method makes to a model.

    Args:
        trained: names of the base's own parameters that it trains.
        parts: the parts that it adds.
    """

    trained: Iterable[str] = ()
    parts: list[Part] = field(default_factory=list)


def join(*parts: str) -> str:
    """A dotted path from its non-empty parts."""
    return ".".join(part for part in parts if part)


def like(module: nn.Module, tensor: Tensor) -> Parameter:
    """A tensor as a parameter on a module's device, in float32 or the module's higher precision."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            precision = torch.promote_types(parameter.dtype, torch.float32)
            return Parameter(tensor.to(device=parameter.device, dtype=precision))
    return Parameter(tensor)
