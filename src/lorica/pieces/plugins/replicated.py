"""A deeper model out of the same weights (`layer_replication`), while adapters that ask for it are on it.

    [[0, 2], [1, 3]]    blocks 0 1 2  ──▶  0 1 1' 2    1' shares 1's parameters; each has its own A and B

The list of blocks is exchanged for one of clones; the blocks themselves are never touched, and come back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorica.config import AdapterConfig
from lorica.errors import StateError, TargetError, listing
from lorica.piece import Piece
from lorica.pieces import Kind, Search, register
from lorica.state import AdapterState
from lorica.tree import walk


@dataclass(eq=False)
class Stack:
    """The changes that `unstack` undoes.

    Args:
        plan: ranges of blocks, as the configuration has them.
        owner: module that holds the list of blocks.
        name: under which it holds it.
        blocks: the list as it was.
        order: for each block of the new list, the index of the one it is a clone of.
        settings: what a transformers configuration said of the blocks.
    """

    plan: list[list[int]]
    owner: nn.Module
    name: str
    blocks: nn.ModuleList
    order: list[int]
    settings: dict[str, Any]


class ReplicatedBlocks(Kind):
    """Exchanges the blocks that `layer_replication` names."""

    def around(self, root: nn.Module, state: AdapterState, config: AdapterConfig) -> Any:  # noqa: D102
        return stacked(root, state, config)

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        return ()

    def opened(self, root: nn.Module, state: AdapterState) -> None:
        """Nothing is left to do: the blocks are there since before the search."""

    def closed(self, root: nn.Module, state: AdapterState) -> None:  # noqa: D102
        unstack(root, state)


@contextmanager
def stacked(root: nn.Module, state: AdapterState, config: AdapterConfig) -> Iterator[None]:
    """Give the model the blocks that an adapter asks for, before it is put on; an error takes them back.

    Raises:
        StateError: adapters on the model ask for others.
        TargetError: the model has no such blocks.
    """
    lora, _ = config.members()
    plan = lora.layer_replication if lora else None
    if state.configs:
        have = state.stack.plan if state.stack else None
        if plan != have:
            raise StateError(
                f"the adapter has layer_replication={plan!r}, and those on the model {have!r}: their blocks "
                "are not the same; put it on a model of its own"
            )
        yield
        return
    if plan is None:
        yield
        return
    state.stack = _restack(root, plan)
    try:
        yield
    except BaseException:
        unstack(root, state)
        raise


def unstack(root: nn.Module, state: AdapterState) -> None:
    """Give the model its own list of blocks back."""
    stack: Stack | None = state.stack
    if stack is None:
        return
    clones = getattr(stack.owner, stack.name)
    stack.blocks.training = clones.training
    for clone, source in reversed(list(zip(clones, stack.order, strict=True))):
        # What befell the clone (train, eval, a move to another device) befell the block.
        for module, twin in zip(stack.blocks[source].modules(), clone.modules(), strict=True):
            module.training = twin.training
            module._buffers.update(twin._buffers)
    stack.owner._modules[stack.name] = stack.blocks
    _settings(stack.owner, root).update(stack.settings)
    state.stack = None


def _restack(root: nn.Module, plan: Sequence[Sequence[int]]) -> Stack:
    owner, name = _blocks(root)
    blocks = owner._modules[name]
    assert isinstance(blocks, nn.ModuleList)
    beyond = [list(part) for part in plan if part[1] > len(blocks)]
    if beyond:
        raise TargetError(
            f"layer_replication names blocks {listing(map(str, beyond))}, [start, end), and {name} has "
            f"{len(blocks)}"
        )
    order = [i for start, end in plan for i in range(start, end)]
    settings = _settings(owner, root)
    before = {key: value for key, value in settings.items() if _is_of_blocks(key, value, len(blocks))}
    owner._modules[name] = nn.ModuleList(_clone(blocks[i], place) for place, i in enumerate(order))
    for key, value in before.items():
        settings[key] = len(order) if isinstance(value, int) else type(value)(value[i] for i in order)
    return Stack([list(part) for part in plan], owner, name, blocks, order, before)


def _blocks(root: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the model's list of blocks, and the name it has there.

    Raises:
        TargetError: there is none, or more than one.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module, parent in walk(root):
        if not isinstance(module, nn.ModuleList) or parent is None or not len(module):
            continue
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if len({type(block) for block in module}) == 1:
            found[path] = parent, path.rpartition(".")[2]
    if len(found) != 1:
        raise TargetError(
            f"layer_replication needs a model with one list of blocks; {type(root).__name__} has "
            f"{listing(found) or 'none'}"
        )
    return next(iter(found.values()))


def _settings(owner: nn.Module, root: nn.Module) -> dict[str, Any]:
    return getattr(getattr(owner, "config", getattr(root, "config", None)), "__dict__", {})


def _is_of_blocks(key: str, value: object, count: int) -> bool:
    """Whether a setting is the number of blocks, or says something of each."""
    if key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        return value == count
    return "layer" in key and isinstance(value, (list, tuple)) and len(value) == count


def _clone(block: nn.Module, place: int) -> nn.Module:
    """A block that shares parameters, buffers and settings, but knows its own place (for the cache)."""
    settings = (module.config for module in block.modules() if hasattr(module, "config"))
    shared = [*block.parameters(), *block.buffers(), *settings]
    clone = copy.deepcopy(block, {id(item): item for item in shared})
    for module in clone.modules():
        if "layer_idx" in vars(module):
            vars(module)["layer_idx"] = place
    return clone


register(ReplicatedBlocks(), "layer_replication")
