"""Products of thin matrices, taken apart without forming them.

    left · right = (Q · R)(R'ᵀ · Q'ᵀ) = Q · (R·R'ᵀ) · Q'ᵀ        only R·R'ᵀ, r × r, is decomposed

All matrices come in groups, as a grouped convolution has them (`Factors.blocks`); others have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.adapter import Factors

Term = tuple[Factors, float]
"""An update and its weight in a sum."""


class Spectrum(NamedTuple):
    """Singular values and vectors of an update, the largest first."""

    U: Float[Tensor, "groups d_out k"]
    S: Float[Tensor, "groups k"]
    Vh: Float[Tensor, "groups k d_in"]

    def cut(self, k: int) -> Spectrum:
        """The `k` largest of each group; no update of that rank is nearer."""
        return Spectrum(self.U[..., :k], self.S[:, :k], self.Vh[:, :k])

    def factors(self, like: Factors) -> Factors:
        """An update of scale 1, B = U·S and A = Vh, in the kind and dtype of `like`."""
        return from_blocks(self.U * self.S.unsqueeze(1), self.Vh, like)


def blocks_of_sum(
    terms: Sequence[Term], dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "groups d_out r"], Float[Tensor, "groups r d_in"]]:
    """The matrices whose product is ``Σ weight·scale·B·A``: B side by side, A stacked."""
    blocks = [factors.blocks() for factors, _ in terms]
    # Weighted in float64, so that each element is rounded once.
    left = [B.double() * (w * f.scale) for (B, _), (f, w) in zip(blocks, terms, strict=True)]
    return torch.cat(left, dim=2).to(dtype), torch.cat([A.to(dtype) for _, A in blocks], dim=1)


def from_blocks(
    left: Float[Tensor, "groups d_out r"], right: Float[Tensor, "groups r d_in"], like: Factors
) -> Factors:
    """The update ``left · right``, of scale 1, in the layout and dtype of `like`, with its bias."""
    point = (1,) * (like.B.dim() - 2)
    A = right.flatten(0, 1).unflatten(1, like.A.shape[1:])
    B = left.flatten(0, 1).unflatten(1, (left.shape[2], *point)) if point else left.flatten(0, 1)
    A, B = A.to(like.A.dtype).contiguous(), B.to(like.B.dtype).contiguous()
    bias = None if like.bias is None else (like.bias.double() * like.scale).to(like.bias.dtype)
    return replace(like, A=A, B=B, scale=1.0, bias=bias)


def spectrum(left: Float[Tensor, "groups d_out r"], right: Float[Tensor, "groups r d_in"]) -> Spectrum:
    """Singular value decomposition of ``left · right``: two thin QR and one SVD of r × r."""
    Q, R = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.mT)
    U, S, Vh = torch.linalg.svd(R @ R_right.mT, full_matrices=False)
    return Spectrum(Q @ U, S, Vh @ Q_right.mT)


def norm(left: Float[Tensor, "groups d_out r"], right: Float[Tensor, "groups r d_in"]) -> float:
    """Frobenius norm of ``left · right``, right to rounding even if its terms cancel each other.

    A norm no larger than the rounding error is 0.
    """
    R, R_right = (torch.linalg.qr(matrix, mode="r").R for matrix in (left, right.mT))
    found, terms = torch.linalg.norm(R @ R_right.mT), torch.linalg.norm(R) * torch.linalg.norm(R_right)
    return float(found) if found > torch.finfo(left.dtype).eps * terms else 0.0
