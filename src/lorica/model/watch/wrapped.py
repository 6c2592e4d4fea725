"""Wrappers that took note of a model's parameters: what comes after would not be trained as one.

DistributedDataParallel averages the gradients of the parameters that it found when it was made;
FullyShardedDataParallel (FSDP1) lays them end to end in flat ones; `fully_shard` (FSDP2) and tensor parallel
split each.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorica.errors import StateError
from lorica.tree import is_sharded, join, walk


def check_unnoted(root: nn.Module, *, trainable: bool) -> None:
    """Refuse a new adapter on a model that was wrapped for training on several devices before.

    Args:
        root: the model inside its wrappers.
        trainable: whether the adapter is to train.

    Raises:
        StateError: naming the wrapper.
    """
    if _is_flattened(root):
        raise StateError(
            f"this {type(root).__name__} was wrapped in FullyShardedDataParallel, which keeps its weights in "
            "flat parameters of its own; put the adapter on first, then wrap the model (or shard it with "
            "torch.distributed.fsdp.fully_shard)"
        )
    _check_unsharded(root)
    if trainable and any(root in set(one.modules()) or one in set(root.modules()) for one in _noting()):
        raise StateError(
            f"this {type(root).__name__} was wrapped in DistributedDataParallel, which averages the "
            "gradients of the parameters that it found then, and would leave out this adapter's; put the "
            "adapter on first, then wrap the model (the old wrapper must be deleted by then)"
        )


def _check_unsharded(root: nn.Module) -> None:
    """Refuse a model whose weights were split over ranks: A and B would be each rank's own.

    Raises:
        StateError: naming one of them.
    """
    split = next(
        (
            (join(place.path, leaf), place.module)
            for place in walk(root)
            for leaf, parameter in place.module._parameters.items()
            if is_sharded(parameter)
        ),
        None,
    )
    if split is None:
        return
    name, module = split
    if "_is_fsdp_managed_module" in module.__dict__:
        raise StateError(
            f"{name} is already sharded; adapt the model before fully_shard (lorica.parallel.shard does), so "
            "that A and B are sharded too"
        )
    raise StateError(
        f"{name} is already split over ranks (tensor parallel: parallelize_module, tp_plan); adapt the model "
        "first, then split it with lorica.parallel.split, which splits A and B to fit"
    )


def _is_flattened(root: nn.Module) -> bool:
    """Whether FSDP1 has the parameters of a module; it marks all modules under it, as `fully_shard` does."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    marked = [module for module in root.modules() if module.__dict__.get("_is_fsdp_managed_module")]
    sharded = any(type(p).__name__ == "DTensor" for module in marked for p in module._parameters.values())
    return bool(marked) and not sharded


def _noting() -> Iterator[nn.Module]:
    """All data-parallel wrappers there are: a model inside one does not know of it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    for found in gc.get_referrers(DistributedDataParallel):
        if type(found) is DistributedDataParallel:
            yield found
