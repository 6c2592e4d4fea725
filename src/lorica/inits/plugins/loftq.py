"""A quantized weight, and factors that make up for its rounding: LoftQ."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.config import LoraConfig
from lorica.config.inits import LoftQConfig
from lorica.find import Target
from lorica.inits.init import Init, Initial, Residual, own, precise, register, stored
from lorica.inits.plugins.lowrank import leading
from lorica.inits.plugins.quantize import quantized


def loftq(
    weight: Float[Tensor, "d_out d_in"], r: int, scale: float, config: LoftQConfig
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"], Float[Tensor, "d_out d_in"]]:
    """Quantize and decompose in turn, so that ``Q + scale · B·A`` comes close to W0.

    Args:
        weight: W0, float32.
        r: rank.
        scale: α/r or α/√r.
        config: bits and rounds.

    Returns:
        A, B, and Q, expanded.

    Source: Li et al., 2023, algorithm 1.
    """
    base = quantized(weight, config.loftq_bits)
    A, B = compensate(weight, base, r, scale)
    for _ in range(config.loftq_iter - 1):
        base = quantized(weight - scale * (B @ A), config.loftq_bits)
        A, B = compensate(weight, base, r, scale)
    return A, B, base


def compensate(
    weight: Float[Tensor, "d_out d_in"], base: Float[Tensor, "d_out d_in"], r: int, scale: float
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """The A and B that bring a quantized weight closest to the original.

    Args:
        weight: the original W0.
        base: the quantized W0, as plain numbers.
        r: rank.
        scale: α/r or α/√r.

    Returns:
        A and B.
    """
    return leading(weight - base, r).halves(scale)


class LoftQ(Init):
    """W0 quantized, and the factors that make up for the rounding."""

    residual: ClassVar[bool] = True

    def factors(  # noqa: D102
        self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return self._decomposed(target, config)[:2]

    def initialize(self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator) -> Initial:  # noqa: D102
        self.check(target, config)
        A, B, base = self._decomposed(target, config)
        return Initial(own(A), own(B), Residual(stored(target, base)))

    def _decomposed(self, target: Target, config: LoraConfig) -> tuple[Tensor, Tensor, Tensor]:
        r, scale = config.rank(target.pattern_path), config.scale(target.path)
        return loftq(precise(target), r, scale, config.loftq_config or LoftQConfig())


register("loftq", LoftQ())
