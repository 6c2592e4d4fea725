"""Check that a merged model still holds its merged parameters, so that W0 can come back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.errors import StateError
from lorica.tree import module_at, owner_of


class Mark(NamedTuple):
    """A merged parameter, as merging left it.

    Args:
        parameter: the parameter.
        shape: its shape; an assignment to its `data` can change it.
        writes: count of writes to it so far; a copy of the model has its own count.
        owner: identity of the parameter whose writes were counted.
    """

    parameter: Parameter
    shape: torch.Size
    writes: int | None
    owner: int


Held = dict[str, Mark]
"""Name in a module → its merged parameter."""


def held(module: nn.Module, names: Iterable[str]) -> Held:
    """Record a module's parameters under these names; buffers, which move by themselves, are left out."""
    found = {}
    for name in names:
        parameter = _parameter(module, name)
        if parameter is not None:
            found[name] = Mark(parameter, parameter.shape, _writes(parameter), id(parameter))
    return found


def check_untouched(root: nn.Module, path: str, module: nn.Module, before: Held) -> None:
    """Refuse to put W0 back where a merged parameter was replaced or written to since the merge.

    Args:
        root: the merged model.
        path: path of a module whose weights were merged.
        module: the module that was there.
        before: what `held` recorded.

    Raises:
        StateError: naming the weight, and what happened to it.
    """
    for name, (parameter, shape, writes, owner) in before.items():
        full = f"{path}.{name}" if path else name
        now = _parameter(module, name) if _stands(root, path, module) else None
        if now is not None and now.is_meta and not parameter.is_meta:
            raise StateError(
                f"{full} was moved to the meta device since the merge, where nothing has values; restore the "
                "model before it is moved there"
            )
        if now is None or now is not parameter or now.shape != shape:
            raise StateError(
                f"{full} was replaced since the merge (resize_token_embeddings? load_state_dict with "
                "assign=True?), so the base's own weight no longer belongs there; restore the model before, "
                "or keep it as it is now"
            )
        if owner == id(parameter) and _writes(parameter) != writes:
            raise StateError(
                f"{full} was written to since the merge (load_state_dict? training?), and putting the base's "
                "own weight back would undo that for the merged weights alone; restore the model before it "
                "is loaded or trained, or keep it as it is now"
            )


def _stands(root: nn.Module, path: str, module: nn.Module) -> bool:
    try:
        return module_at(root, path) is module
    except (KeyError, AssertionError):
        return False


def _parameter(module: nn.Module, name: str) -> Parameter | None:
    try:
        owner, leaf = owner_of(module, name)
    except (KeyError, AssertionError):
        return None
    return owner._parameters.get(leaf)


def _writes(tensor: Tensor) -> int | None:
    """Count of writes to a tensor; a move to another device or dtype does not count."""
    return None if tensor.is_inference() else tensor._version
