"""A model of which each rank holds a part: what it cannot do, and who writes for all.

Sharded by `torch.distributed.fsdp.fully_shard`, or split by tensor parallel; its parameters are DTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.errors import FileError, StateError
from lorica.tree import is_sharded, walk


def part_of(root: nn.Module) -> Any:
    """A parameter of which each rank holds a part; None where the model is whole."""
    return next((parameter for parameter in root.parameters() if is_sharded(parameter)), None)


def check_whole(root: nn.Module, doing: str, instead: str) -> None:
    """Refuse what needs whole weights.

    Args:
        root: the model.
        doing: what is asked for.
        instead: what to do.

    Raises:
        StateError: each rank has only a part of them.
    """
    if part_of(root) is not None:
        raise StateError(
            f"cannot {doing}: this {type(root).__name__} is sharded, so each rank holds a part of every "
            f"weight; {instead}"
        )


def blocks_of(root: nn.Module) -> list[nn.Module]:
    """Units that `fully_shard` gathers: the modules that transformers names, or members of lists."""
    modules = [place.module for place in walk(root)][1:]
    named = getattr(root, "_no_split_modules", None) or ()
    found = [module for module in modules if not class_names(module).isdisjoint(named)]
    return found or [member for module in modules for member in _members(module)]


def class_names(module: nn.Module) -> set[str]:
    """Names of a module's class and of those below: an adapted one is of its own too."""
    return {cls.__name__ for cls in type(module).__mro__}


def _members(module: nn.Module) -> Iterator[nn.Module]:
    """The members of a list of modules, where each has parts and is called."""
    for member in module if isinstance(module, nn.ModuleList) and len(module) > 1 else ():
        if type(member).forward is not nn.Module.forward and any(member.children()):
            yield member


STREAM = (
    "lorica.save the adapter, then merge it into the base's files without loading them: "
    "lorica merge BASE ADAPTER -o MERGED --stream"
)


def once(root: nn.Module, write: Callable[[], Path], directory: str | Path) -> Path:
    """Have one rank write for all that share a model; the others wait until it has.

    Args:
        root: the model.
        write: writes, and returns where.
        directory: where that will be.

    Returns:
        The folder, on every rank.

    Raises:
        FileError: the rank that writes could not; there its own error is raised.
    """
    part = part_of(root)
    if part is None:
        return write()
    from torch import distributed

    mesh = part.device_mesh._get_root_mesh()  # the other dimensions' ranks too, which have the same adapter
    error: BaseException | None = None
    failed = torch.zeros((), dtype=torch.int32, device=mesh.device_type)
    if not any(mesh.get_coordinate()):
        try:
            write()
        except Exception as caught:
            error = caught
            failed.fill_(1)
    for group in mesh.get_all_groups():
        distributed.all_reduce(failed, op=distributed.ReduceOp.MAX, group=group)
    if error is not None:
        raise error
    if failed.item():
        raise FileError(f"rank 0 could not write the adapter to {directory}; its own error says why")
    return Path(directory)
