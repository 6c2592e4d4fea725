"""The leading singular triples of a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorica._shapes import Float


class Triple(NamedTuple):
    """``U·diag(S)·Vh``: U (rows, k), S (k,) from the largest down, Vh (k, columns)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def first(self, k: int) -> Triple:
        """The k largest."""
        return Triple(self.U[:, :k], self.S[:k], self.Vh[:k])

    def halves(self, scale: float) -> tuple[Tensor, Tensor]:
        """A and B with ``scale · B·A`` this product, the singular values shared evenly."""
        root = (self.S / scale).clamp_min(0).sqrt()
        return root[:, None] * self.Vh, self.U * root


def leading(
    matrix: Float[Tensor, "rows columns"],
    k: int,
    *,
    niter: int | None = None,
    oversampling: int = 0,
    random: torch.Generator | None = None,
) -> Triple:
    """The k leading singular triples, exactly or by randomized subspace iteration.

    Args:
        matrix: (rows, columns), in the precision to compute in.
        k: how many; at most the smaller side.
        niter: subspace iterations; None decomposes the whole matrix.
        oversampling: more directions to iterate with than are kept.
        random: source of the random test matrix, on the CPU.

    Returns:
        The triples.

    Source: Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1.
    """
    width = min(k + oversampling, *matrix.shape)
    if niter is None:
        return Triple(*torch.linalg.svd(matrix, full_matrices=False)).first(k)
    test = torch.randn(matrix.shape[1], width, generator=random, dtype=matrix.dtype, device="cpu")
    test = test.to(matrix.device)
    Q = _basis(matrix @ test)
    for _ in range(niter):
        Q = _basis(matrix @ _basis(matrix.t() @ Q))
    U, S, Vh = torch.linalg.svd(Q.t() @ matrix, full_matrices=False)
    return Triple(Q @ U, S, Vh).first(k)


def _basis(vectors: Tensor) -> Tensor:
    return torch.linalg.qr(vectors).Q
