"""Tensors of which each rank holds a part (DTensors of `fully_shard` and of tensor parallel), whole and back.

part of each rank ── whole ──▶ the tensor, on every rank        value ── spread ──▶ each rank's part
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorica.tree import is_sharded


def whole(tensor: Tensor) -> Tensor:
    """A tensor as all ranks have it together; they must all ask. One that is no part is returned as it is."""
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor.detach()
    return part.full_tensor()


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A value as another tensor is laid out over ranks; each rank has the whole value, and nothing is sent.

    Args:
        value: in the whole shape.
        like: what it is for.
    """
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    part: Any = like
    value = value.to(device=part.to_local().device)
    return distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None)
