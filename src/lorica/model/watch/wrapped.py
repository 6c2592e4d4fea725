"""Wrappers that took note of a model's parameters: what comes after would not be trained as one.

DistributedDataParallel averages the gradients of the parameters that it found when it was made;
FullyShardedDataParallel (FSDP1) lays them end to end in flat ones.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorica.errors import StateError


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
    if trainable and any(root in set(one.modules()) or one in set(root.modules()) for one in _noting()):
        raise StateError(
            f"this {type(root).__name__} was wrapped in DistributedDataParallel, which averages the "
            "gradients of the parameters that it found then, and would leave out this adapter's; put the "
            "adapter on first, then wrap the model (the old wrapper must be deleted by then)"
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
