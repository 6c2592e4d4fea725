"""Dropout masks: drawn eight bits a number, and kept as one."""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.choice import traced

try:
    import numpy
except ModuleNotFoundError:  # torch runs without it, and so does lorica
    numpy = None

_LEVELS = 256  # a mask element is drawn from eight random bits


def drop_rate(p: float) -> float:
    """The rate that dropout draws with: `p` to the nearest 1/256, but no p > 0 becomes 0 or 1."""
    return min(max(round(p * _LEVELS), 1), _LEVELS - 1) / _LEVELS if p > 0 else 0.0


def keep_mask(like: Tensor, p: float) -> Tensor:
    """Draw a dropout mask: 1 with probability 1 − `drop_rate(p)`, else 0, independently for each element.

    Each 64-bit draw of the device's default generator gives eight elements, so a mask costs a fraction of one
    float drawn per element. It stays in bytes: on a CPU, comparing bytes in place and casting them is ten
    times faster than going through torch's booleans.

    Args:
        like: tensor whose shape and device the mask takes.
        p: probability of dropping, in (0, 1).

    Returns:
        uint8 tensor of `like`'s shape.
    """
    return random_bytes(like)[: like.numel()].ge_(kept_from(p)).view(like.shape)


def kept_from(p: float) -> int:
    """The least random byte whose element is kept."""
    return round(drop_rate(p) * _LEVELS)


def random_bytes(like: Tensor) -> Tensor:
    """At least as many random bytes as `like` has elements, from the default generator of its device.

    On a CPU torch draws 64 bits after 64 bits from a Mersenne twister. Here one such draw seeds numpy's
    SFC64, which gives the rest in less than half the time.
    """
    words = (like.numel() + 7) // 8
    # Over the whole range all 64 bits are random, the sign bit too. Not drawn in place (`random_`): compilers
    # and vmap refuse that.
    whole = torch.iinfo(torch.int64)
    if numpy is None or like.device.type != "cpu" or type(like) is not Tensor or traced():
        drawn = torch.randint(whole.min, whole.max, (words,), dtype=torch.int64, device=like.device)
        return drawn.view(torch.uint8)
    seed = int(torch.randint(whole.min, whole.max, (), dtype=torch.int64, device=like.device)) - whole.min
    return torch.from_numpy(numpy.random.SFC64(seed).random_raw(words).view(numpy.uint8))


def packed(mask: Tensor | None) -> Tensor | None:
    """A mask as bits, flat, to be kept for the backward pass; where numpy has no hand in it, as it is."""
    if mask is None or numpy is None or mask.device.type != "cpu" or type(mask) is not Tensor or traced():
        return mask
    return torch.from_numpy(numpy.packbits(mask.numpy()))


def unpacked(bits: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The mask (tokens, d_in) that `packed` made bits of."""
    if bits is None or numpy is None or bits.dim() > 1:
        return bits
    return torch.from_numpy(numpy.unpackbits(bits.numpy(), count=shape.numel())).view(shape)
