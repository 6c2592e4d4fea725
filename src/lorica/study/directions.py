"""An update's singular values and directions, taken from its factors; a d × d product is never formed."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.adapter import Factors
from lorica.algebra.spectrum import blocks_of_sum
from lorica.algebra.spectrum import spectrum as taken_apart
from lorica.errors import AdapterError, ConfigError, listing

Side = Literal["A", "B", "input", "output"]
"""Kinds of directions: A's right-singular vectors and B's left-singular ones, as the paper compares them; or
the right (``"input"``) and left (``"output"``) ones of B·A, ordered by their share in the update."""


class Update(NamedTuple):
    """Singular values and vectors of ``scale·B·A``, the largest first; zeros are left out."""

    U: Float[Tensor, "d_out k"]
    S: Float[Tensor, " k"]
    Vh: Float[Tensor, "k d_in"]


def singular_values(factors: Factors, path: str = "the update") -> Float[Tensor, " k"]:
    """All singular values of ``scale·B·A``, the largest first, zeros included, in float64.

    Raises:
        AdapterError: it holds NaN or infinity.
    """
    B, A = _blocks(factors, path)
    R, R_right = (torch.linalg.qr(matrix, mode="r").R for matrix in (B, A.mT))
    return torch.linalg.svdvals(R @ R_right.mT).flatten().sort(descending=True).values


def decompose(factors: Factors, path: str = "the update") -> Update:
    """Singular value decomposition of ``scale·B·A``, in float64.

    Raises:
        AdapterError: it is zero, holds NaN or infinity, or updates a grouped convolution, which is not a
            single product.
    """
    found = taken_apart(*_single(factors, path))
    U, S, Vh = found.cut(_rank(found.S[0], path, "its update"))
    return Update(U[0], S[0], Vh[0])


def directions(factors: Factors, side: Side, path: str = "the update") -> Float[Tensor, "d k"]:
    """Orthonormal directions of an update, the strongest first; those of singular value 0 are left out.

    Args:
        factors: the update.
        side: the kind of directions.
        path: its name for messages.

    Returns:
        One direction per column, of d_in elements for ``"A"`` and ``"input"``, d_out for ``"B"`` and
        ``"output"``.

    Raises:
        AdapterError: there are none, as for a B that is still zero; it holds NaN or infinity; or it updates a
            grouped convolution.
        ConfigError: `side` has another value.
    """
    if side not in get_args(Side):
        raise ConfigError(f"side must be one of {listing(get_args(Side))}, not {side!r}")
    if side in ("input", "output"):
        update = decompose(factors, path)
        return update.Vh.mT if side == "input" else update.U
    B, A = _single(factors, path)
    Q, R = torch.linalg.qr(A[0].mT if side == "A" else B[0])
    U, S, _ = torch.linalg.svd(R, full_matrices=False)
    return Q @ U[:, : _rank(S, path, side)]


def orthonormal(d: int, k: int, draw: torch.Generator) -> Float[Tensor, "d k"]:
    """`k` random orthonormal directions, uniformly distributed."""
    return torch.linalg.qr(torch.randn(d, k, generator=draw, dtype=torch.float64)).Q


def top_directions(
    W: Float[Tensor, "d_out d_in"], k: int, draw: torch.Generator, *, rounds: int = 12
) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, " k"], Float[Tensor, "k d_in"]]:
    """A large matrix's `k` leading singular vectors and values, by subspace iteration.

    Args:
        W: the matrix.
        k: number of singular vectors; at most the smaller side of W.
        draw: generator of the start.
        rounds: number of products with W and Wᵀ. If the values fall off slowly, the last few directions are
            mixed with the next ones, which hardly changes their energy.

    Source: Halko, Martinsson and Tropp, 2011, algorithm 4.4.
    """
    small = min(W.shape)
    if 2 * k >= small:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :k], S[:k], Vh[:k]
    wide = min(max(2 * k, k + 20), small)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], wide, generator=draw, dtype=W.dtype)).Q
    for _ in range(rounds):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return Q @ U[:, :k], S[:k], Vh[:k]


def _single(factors: Factors, path: str) -> tuple[Tensor, Tensor]:
    if factors.groups > 1:
        raise AdapterError(
            f"{path} is a convolution in {factors.groups} groups, whose update is that many products with no "
            "common directions; only its spectrum can be computed"
        )
    return _blocks(factors, path)


def _blocks(factors: Factors, path: str) -> tuple[Tensor, Tensor]:
    if factors.kind == "parameter":
        raise AdapterError(
            f"{path} is the update of a parameter (target_parameters), which may stack many experts' and is "
            "no single product B·A; study an adapter without target_parameters"
        )
    for name in ("A", "B"):
        if not getattr(factors, name).isfinite().all():
            raise AdapterError(f"{path}: {name} holds NaN or infinity, so its update has no spectrum")
    return blocks_of_sum([(factors, 1.0)])


def _rank(S: Tensor, path: str, what: str) -> int:
    k = int((S[0] * len(S) * torch.finfo(S.dtype).eps < S).sum())
    if not k:
        raise AdapterError(
            f"{path}: {what} is zero and so has no directions; the adapter has not been trained"
        )
    return k
