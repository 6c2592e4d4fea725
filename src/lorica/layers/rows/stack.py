"""The factors of a linear layer's adapters, stacked for two batched products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.choice import traced
from lorica.functional import needs_evening
from lorica.layers.rows.blocks import Blocks


class Stack(NamedTuple):
    """Factors of some adapters, of one rank or filled up to it with zeros.

    Args:
        names: the adapters; None for one without rows.
        A: (adapters, r, d_in).
        B: (adapters, d_out, r).
        scale: of their products; a tensor (adapters, 1, 1) where they differ.
    """

    names: Sequence[str | None]
    A: Tensor
    B: Tensor
    scale: float | Tensor


def stacked(layer: Any, dtype: torch.dtype, names: Sequence[str], mixture: Any, gaps: float) -> list[Stack]:
    """The factors of some adapters of a layer, from where they lie side by side, if they do.

    Args:
        layer: the adapted layer (`LoraLinear`).
        dtype: of the result.
        names: the adapters.
        mixture: what asks (`Rows`).
        gaps: how many times as many adapters may lie between, if that spares a copy.
    """
    taken, scaling = None, layer.scaling
    scales = {scaling[name] for name in names}
    if not traced() and not any(map(needs_evening, scales)):
        As, Bs = layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules
        blocks = layer.blocks
        if blocks is None:
            blocks = layer.__dict__["blocks"] = Blocks()
        taken = blocks.take(As, Bs, names, mixture, gaps)
    if taken is None:
        return [_stacked_anew(layer, dtype, names)]
    stacks = []
    for own, A, B in taken:
        acting = scales if len(scales) == 1 else {scaling[name] for name in own if name}
        scale: float | Tensor = next(iter(acting))
        if len(acting) > 1:
            each = [scaling[name] if name else 1.0 for name in own]
            scale = torch.tensor(each, dtype=dtype).view(-1, 1, 1)
        stacks.append(Stack(own, A.to(dtype), B.to(dtype), scale))
    return stacks


def _stacked_anew(layer: Any, dtype: torch.dtype, names: Sequence[str]) -> Stack:
    """The same of factors that stay where they are, filled up with zeros to one rank."""
    As, Bs, scales, _ = zip(*(layer.update_of(name) for name in names), strict=True)
    r = max(A.shape[0] for A in As)
    A = torch.stack([A if A.shape[0] == r else F.pad(A, (0, 0, 0, r - A.shape[0])) for A in As])
    B = torch.stack([B if B.shape[1] == r else F.pad(B, (0, r - B.shape[1])) for B in Bs])
    scale = torch.tensor(scales, dtype=dtype, device=A.device).view(-1, 1, 1)
    return Stack(names, A.to(dtype), B.to(dtype), scale)
