"""Quantize a weight and expand it again, bit for bit as bitsandbytes does."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica._shapes import Float

_BLOCK = 64
# The sixteen values of NF4 (Dettmers et al., 2023, appendix E): quantiles of the normal distribution, scaled
# to [-1, 1], with an exact zero. Written out, because quantiles computed anew differ in the last bit.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantized(weight: Float[Tensor, "d_out d_in"], bits: int) -> Float[Tensor, "d_out d_in"]:
    """Quantize a weight and expand it again.

    Args:
        weight: float32.
        bits: 4 for NF4 in blocks of 64 with a float32 scale each; 8 for whole numbers with one scale a row,
            of the weight in half precision.

    Returns:
        The weight, rounded to that many bits.
    """
    return _nf4(weight) if bits == 4 else _int8(weight)


def _nf4(weight: Tensor) -> Tensor:
    values, between = _table(weight.device)
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    # A block of zeros has no scale to divide by; any code then decodes to zero.
    codes = torch.bucketize(blocks * (1 / largest.where(largest > 0, 1.0)), between)
    return (values[codes] * largest).flatten()[: flat.numel()].view_as(weight)


def _int8(weight: Tensor) -> Tensor:
    half = weight.half().float()
    largest = half.abs().amax(1, keepdim=True)
    codes = torch.round(half * (127 / largest.where(largest > 0, 1.0)))
    return codes * largest * (1 / 127)


@functools.cache
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.tensor(_NF4, device=device)
    return values, (values[1:] + values[:-1]) / 2
