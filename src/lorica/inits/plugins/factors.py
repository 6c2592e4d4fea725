"""Inits from W0's leading directions, which are subtracted from it: PiSSA and OLoRA."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.config import LoraConfig
from lorica.config.inits import niter
from lorica.find import Target
from lorica.inits.init import Init, precise, register
from lorica.inits.plugins.lowrank import leading


def pissa(
    weight: Float[Tensor, "d_out d_in"],
    r: int,
    scale: float,
    *,
    niter: int | None = None,
    random: torch.Generator | None = None,
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """W0's r principal directions: ``scale · B·A`` is the matrix of rank r closest to W0.

    Args:
        weight: W0, in the precision to compute in.
        r: rank.
        scale: α/r or α/√r.
        niter: None decomposes all of W0; a number gives the subspace iterations of a randomized
            decomposition, which is much faster and nearly as close from 4 on.
        random: source of the randomized decomposition's draws.

    Returns:
        A and B.

    Source: Meng, Wang and Zhang, 2024, eq. 2 to 4.
    """
    return leading(weight, r, niter=niter, random=random).halves(scale)


def olora(
    weight: Float[Tensor, "d_out d_in"], r: int
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """The first r columns of Q and rows of R, where ``W0 = Q·R``: B has orthonormal columns.

    Args:
        weight: W0, in the precision to compute in.
        r: rank.

    Returns:
        A and B; ``scale · B·A`` is to be subtracted from W0.

    Source: Büyükakyüz, 2024, algorithm 1.
    """
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]


class Pissa(Init):
    """W0's principal part; ``"pissa_niter_N"`` by a randomized decomposition."""

    residual: ClassVar[bool] = True

    def takes(self, value: bool | str) -> bool:  # noqa: D102
        return niter(value) is not None

    def factors(  # noqa: D102
        self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        iterations = niter(config.init_lora_weights)
        r, scale = config.rank(target.pattern_path), config.scale(target.path)
        return pissa(precise(target), r, scale, niter=iterations, random=random)


class Olora(Init):
    """The first columns and rows of W0's QR decomposition."""

    residual: ClassVar[bool] = True

    def factors(  # noqa: D102
        self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return olora(precise(target), config.rank(target.pattern_path))


register("pissa", Pissa())
register("olora", Olora())
