"""A merged model: its adapters behind the merge, and making the merge final."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from lorica.errors import StateError
from lorica.model.adapt import close
from lorica.model.merging.merge import put
from lorica.state import adapted
from lorica.tree import put_at

M = TypeVar("M", bound=nn.Module)


@contextmanager
def behind_merge(model: nn.Module) -> Iterator[None]:
    """Give a merged model its adapted classes for the length of a block; the weights stay merged.

    The model must not compute anything meanwhile. If nothing is merged, this does nothing.

    Args:
        model: adapted model.

    Raises:
        StateError: the model carries no adapter.
    """
    _, state = adapted(model)
    if not state.merged:
        yield
        return
    shown, merged, state.merged = state.aside.shown, state.merged, ()
    state.aside.show()
    try:
        yield
    finally:
        state.merged = merged
        if not shown:
            state.aside.hide()


@contextmanager
def as_unmerged(model: nn.Module) -> Iterator[None]:
    """As `behind_merge`, but also with the base's own parameters in place.

    Args:
        model: adapted model.

    Raises:
        StateError: the model carries no adapter.
    """
    root, state = adapted(model)
    if not state.merged:
        yield
        return
    with behind_merge(model):
        aside = state.aside
        own = [(item, put(item.module, item.originals)) for item in aside.modules]
        replaced = {name: p for step in aside.steps for name, p in step.originals.items()}
        copies = {name: put_at(root, name, original) for name, original in replaced.items()}
        try:
            yield
        finally:
            for name, copy in copies.items():
                put_at(root, name, copy)
            for item, merged in own:
                put(item.module, merged)


def stay_adapted(model: nn.Module) -> None:
    """Give a merged model its adapted classes, with no adapter acting, until `restore`.

    Code that inspects the model then finds the adapters, their parameters and what is merged. The base's own
    classes compute faster.

    Args:
        model: merged model.
    """
    _, state = adapted(model)
    state.aside.show()
    state.active = ()


def finalize(model: M) -> M:
    """Make a merge final: drop W0 and all adapters; parameters that trained before `adapt` train again.

    Args:
        model: merged model.

    Returns:
        The same model, with its own classes and keys.

    Raises:
        StateError: nothing is merged.
    """
    root, state = adapted(model)
    if not state.merged:
        raise StateError("nothing is merged, so there is nothing to make final; call lorica.merge first")
    state.aside.hide()
    thawed = {id(parameter) for parameter in state.frozen}
    replaced = {
        f"{item.path}.{name}" if item.path else name
        for item in state.aside.modules
        for name, original in item.originals.items()
        if id(original) in thawed
    }
    taken = {path for path, original in state.originals.items() if id(original) in thawed}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if id(parameter) in thawed or name in replaced | taken:
            parameter.requires_grad_(True)
    close(root, state)
    return model
