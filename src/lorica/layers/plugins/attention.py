"""torch's own attention and encoder layers, which read the weights of their parts without calling them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica.errors import TargetError
from lorica.layers.base import LoraLayer
from lorica.layers.kinds import KINDS, PARTS
from lorica.layers.linear import LoraLinear
from lorica.layers.saved import READERS
from lorica.tree import Place


def merged_weight(layer: LoraLayer) -> Tensor:
    """W0 plus the acting adapters' delta weights, with a graph: for code that reads the weight itself.

    Returns:
        The sum in W0's layout and dtype, computed in float32 or W0's higher precision.
    """
    weight, names, everything = layer.base_weight, layer.acting(), slice(None)
    if not names or layer.shard_of(layer.weight_name) is not None:
        return weight
    stands = result = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    for name in names:
        A, B, scale, _ = layer.update_of(name)
        A, B = A.flatten(1).to(stands.dtype), B.flatten(1).to(stands.dtype)
        left, right = (A.t(), B.t()) if layer.transposed else (B, A)
        variant = layer.variants[name]
        if not variant.turns:
            result = torch.addmm(result, left, right, alpha=scale)
        else:
            own = layer.weight_beside(name)
            own = stands if own is None else own.flatten(1).to(stands.dtype)
            folded = torch.addmm(own, left, right, alpha=scale)
            result = result + (variant.weight(layer, name, own, folded, everything) - own)
    return result.view(weight.shape).to(weight.dtype)


class LoraReadLinear(LoraLinear):
    """A linear layer whose weight others read, past its forward.

    It is `linear1` or `linear2` of an `nn.TransformerEncoderLayer`. In evaluation that layer hands the raw
    weights to one fused kernel. So `weight` shows W0 with the active updates folded in, and the kernel
    computes what `forward` would.
    """

    rows_differ: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False

    @property
    def weight(self) -> Tensor:
        """W0 + Σ scale·B·A of the active adapters; W0 itself stays in `base_weight`."""
        return merged_weight(self)


class LoraAttentionOutput(LoraReadLinear):
    """`out_proj` of `nn.MultiheadAttention`, which is never called: its weight is always read."""

    takes_dropout: ClassVar[bool] = False


class LoraAttention(LoraLayer):
    """`nn.MultiheadAttention`: the update of its fused query, key and value projection.

    The attention reads `in_proj_weight` in training, in evaluation and on its fused path alike; showing it W0
    with the update folded in makes each of them right, once, and W0 is never written to. Its output
    projection is a layer of its own, `LoraAttentionOutput`.
    """

    weight_name: ClassVar[str] = "in_proj_weight"
    takes_dropout: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False
    rows_differ: ClassVar[bool] = False

    @classmethod
    def check_place(cls, place: Place) -> None:  # noqa: D102
        if not place.module._qkv_same_embed_dim:
            raise TargetError(
                "Only same embed for query/key/value is supported as of now for MultiheadAttention: "
                f"{place.path} is an nn.MultiheadAttention with kdim or vdim of its own, and has no single "
                "weight to adapt; target its out_proj"
            )
        super().check_place(place)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention as it is: it reads the weight below."""
        return super(LoraLayer, self).forward(*args, **kwargs)

    @property
    def in_proj_weight(self) -> Tensor:
        """W0 + Σ scale·B·A of the active adapters; W0 itself stays in `base_weight`."""
        return merged_weight(self)


KINDS[nn.MultiheadAttention] = LoraAttention
READERS.append(lambda part, parent: isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer))
PARTS.update({nn.MultiheadAttention: LoraAttentionOutput, nn.TransformerEncoderLayer: LoraReadLinear})
