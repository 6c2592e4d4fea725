"""A merged model: looking behind the merge, and making it final."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from lorica.errors import StateError
from lorica.layers import SwappedModule
from lorica.layers.quantized import release_layout
from lorica.model.structure import ROSTER, adapted

M = TypeVar("M", bound=nn.Module)


@contextmanager
def behind_merge(model: nn.Module) -> Iterator[None]:
    """Let a merged model show its adapters for a moment; the weights stay merged.

    Nothing may be computed with the model meanwhile. Where nothing is merged, this does nothing.

    Args:
        model: adapted model.

    Raises:
        StateError: the model carries no adapter.
    """
    _, roster = adapted(model)
    if not roster.merged:
        yield
        return
    merged, roster.merged = roster.merged, ()
    for item in roster.aside.modules:
        SwappedModule.enter(item.module, item.state)
    try:
        yield
    finally:
        for item in roster.aside.modules:
            item.state = item.module.leave()
        roster.merged = merged


def settle(model: M) -> M:
    """Make a merge final: W0 and all adapters are let go, and what trained before `adapt` trains again.

    Args:
        model: merged model.

    Returns:
        The same model, with its own classes and keys.

    Raises:
        StateError: nothing is merged.
    """
    root, roster = adapted(model)
    if not roster.merged:
        raise StateError("nothing is merged, so there is nothing to settle; call lorica.merge first")
    thawed = {id(parameter) for parameter in roster.frozen}
    replaced = {
        f"{item.path}.{name}" if item.path else name
        for item in roster.aside.modules
        for name, original in item.originals.items()
        if id(original) in thawed
    }
    taken = {path for path, original in roster.originals.items() if id(original) in thawed}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if id(parameter) in thawed or name in replaced | taken:
            parameter.requires_grad_(True)
    release_layout(roster.layouts)
    delattr(root, ROSTER)
    return model
