"""An init whose first steps follow full fine-tuning's: LoRA-GA."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.config import LoraConfig
from lorica.config.inits import LoraGAConfig
from lorica.find import Target
from lorica.inits.init import Init, precise, register
from lorica.inits.plugins.lowrank import Triple, leading
from lorica.inits.plugins.seen import check_seen

_NITER = 4


def lead(gradient: Float[Tensor, "d_out d_in"], r: int, random: torch.Generator) -> Triple:
    """The leading 2r singular triples of a gradient, by randomized decomposition."""
    return leading(gradient, 2 * r, niter=_NITER, oversampling=2 * r, random=random)


def lora_ga(
    triples: Triple,
    r: int,
    scale: float,
    weight: Float[Tensor, "d_out d_in"],
    config: LoraGAConfig,
    random: torch.Generator,
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """A from right singular vectors of the gradient, B from left ones times their singular values.

    B carries the singular values as in PEFT; the paper leaves them out.

    Args:
        triples: the gradient's leading 2r.
        r: rank.
        scale: α/r or α/√r.
        weight: W0, in the precision to compute in.
        config: chooses the vectors and their length.
        random: source of draws, for ``direction="random"`` and the norm of W0.

    Returns:
        A and B.

    Source: Wang, Yu and Li, 2024, algorithm 1.
    """
    first, second = torch.arange(2 * r, device="cpu").split(r)
    if config.direction == "ArB2r":
        for_A, for_B = first, second
    elif config.direction == "A2rBr":
        for_A, for_B = second, first
    elif config.direction == "ArBr":
        for_A, for_B = 2 * first + 1, 2 * first
    else:
        for_A = for_B = torch.randperm(2 * r, generator=random, device="cpu")[:r]
    A, largest = triples.Vh[for_A], triples.S[for_B]
    B = triples.U[:, for_B] * largest
    if config.scale == "stable":
        B = B * (weight.shape[0] ** 0.25 / config.stable_gamma**0.5)
    elif config.scale == "weight_svd" and largest[0] > 0:
        norm = leading(weight, 1, niter=_NITER, oversampling=r - 1, random=random).S[0]
        B = B * (norm / largest[0])
    elif config.scale == "gd_scale":
        A, B = A / scale, B / scale
    return A, B


class LoraGA(Init):
    """Singular vectors of the weight's gradient."""

    residual: ClassVar[bool] = True
    looks: ClassVar[bool] = True
    directions: ClassVar[int] = 2

    def factors(  # noqa: D102
        self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        triples = check_seen(seen, Triple, 2, target, config, "lorica.peft.preprocess_loraga")
        r, scale = config.rank(target.pattern_path), config.scale(target.path)
        settings = config.lora_ga_config or LoraGAConfig()
        return lora_ga(triples, r, scale, precise(target), settings, random)


register("lora_ga", LoraGA())
