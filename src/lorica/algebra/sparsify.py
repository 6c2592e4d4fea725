"""The pruning methods' operations on the elements of tensors of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

MajoritySign = Literal["total", "frequency"]


def trim(tensor: Tensor, density: float) -> Tensor:
    """Keep the share `density` of the elements, the largest in magnitude, and zero the others."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(tensor)


def drop_and_rescale(tensor: Tensor, density: float, random: torch.Generator) -> Tensor:
    """Keep each element with probability `density` and divide it by `density`; the expectation stays.

    Source: Yu et al., 2023, "Language Models are Super Mario" (DARE), §3.2.
    """
    mask = torch.bernoulli(torch.full(tensor.shape, density, device="cpu"), generator=random)
    return tensor * mask.to(tensor) / density


def weighted_sum(stack: Tensor, weights: Sequence[float]) -> Tensor:
    """``Σ weight·tensor`` over the first dimension of `stack`."""
    return _weighted(stack, weights).sum(0)


def elected_mean(stack: Tensor, weights: Sequence[float], majority: MajoritySign) -> Tensor:
    """The mean of the elements that agree in sign with the majority; weighted, not divided by the weights.

    Args:
        stack: the tensors, stacked: (adapters, ...).
        weights: of each; they have no part in the vote.
        majority: each element's sign is that of the tensors' sum (``"total"``) or that of most of them
            (``"frequency"``). A draw is positive.

    Source: Yadav et al., 2023, "TIES-Merging", §3, elect and disjoint merge; with weights as PEFT has them.
    """
    votes = stack if majority == "total" else stack.sign()
    agrees = stack.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (_weighted(stack, weights) * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _weighted(stack: Tensor, weights: Sequence[float]) -> Tensor:
    return stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(
        -1, *[1] * (stack.dim() - 1)
    )
