"""Starts that take W0's own leading part out of it: PiSSA and OLoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.init.lowrank import leading


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
        niter: None decomposes all of W0; else subspace iterations of a randomized decomposition, which is
            much quicker and nearly as close from 4 on.
        random: source of that one's draws.

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
        A and B. What they take out of W0 is ``scale · B·A``.

    Source: Büyükakyüz, 2024, algorithm 1.
    """
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]
