"""The names of a head's classes, which a model's configuration holds and the base's does not know."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lorica.adapter import Adapter
from lorica.state import AdapterState


def names_of(root: nn.Module, extras: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """Names of the classes, where an adapter has the head whose outputs they are; None where it has none.

    Args:
        root: the model.
        extras: what the adapter trained whole.
    """
    given = getattr(getattr(root, "config", None), "id2label", None) or {}
    try:
        names = tuple(str(given[place]) for place in range(len(given)))
    except KeyError:
        return None
    unnamed = all(name == f"LABEL_{place}" for place, name in enumerate(names))
    return None if unnamed or not _heads(extras, len(names)) else names


def give(root: nn.Module, state: AdapterState, adapter: Adapter) -> None:
    """Name a model's classes as an adapter that brings its own head does; `take_back` undoes it."""
    names, config = adapter.classes, getattr(root, "config", None)
    before = getattr(config, "id2label", None)
    if names is None or not before or len(before) != len(names) or not _heads(adapter.extras, len(names)):
        return
    state.classes = (dict(before), dict(config.label2id))  # type: ignore[union-attr]
    config.id2label = dict(enumerate(names))  # type: ignore[union-attr]
    config.label2id = {name: place for place, name in enumerate(names)}  # type: ignore[union-attr]


def take_back(root: nn.Module, state: AdapterState) -> None:
    """Name a model's classes as before `give`."""
    if state.classes is not None:
        root.config.id2label, root.config.label2id = state.classes  # type: ignore[union-attr]
        state.classes = None


def _heads(extras: Mapping[str, Tensor], outputs: int) -> bool:
    return any(
        name.endswith(".weight") and tensor.dim() == 2 and tensor.shape[0] == outputs
        for name, tensor in extras.items()
    )
