"""Compression: a lower rank for nearly the same update, by the factors' singular value decomposition."""

from __future__ import annotations

import dataclasses

import torch

from lorica.adapter import Adapter, Factors
from lorica.algebra.report import ErrorReport, error
from lorica.algebra.settings import describing, tied
from lorica.algebra.spectrum import Spectrum, blocks_of_sum, spectrum
from lorica.algebra.terms import check_no_parameters
from lorica.config.checks import check_count, check_share
from lorica.errors import ConfigError


def compress(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, ErrorReport]:
    """Cut each layer's update to the rank it needs; no update of that rank is nearer to it.

    The decomposition is taken from the factors, by QR of B and Aᵀ and the SVD of an r × r matrix, in float64;
    B·A itself is never formed. Embeddings and convolutions are compressed too, grouped ones group by group.

    DoRA's magnitudes are kept. Every forward pass scales the rows of ``W0 + scale·B·A`` to them, so they hold
    for the compressed update too. Compression changes the rows' directions, which the report measures.

    Args:
        adapter: the adapter to compress; heads and biases stay as they are.
        rank: the highest rank of any layer, at least 1; in a grouped convolution it is rounded down to a
            multiple of the groups. None sets no limit.
        energy: share of ``‖ΔW‖²`` (Frobenius) to keep in each layer, in (0, 1]; each layer gets the smallest
            rank that keeps it, within `rank`. None and 1 drop only directions that are zero to rounding.

    Returns:
        The compressed adapter, with a scale of 1 throughout and the given adapter's dtypes; and the relative
        error of each layer: √(1 − kept energy), plus the error of storing in that dtype.

    Raises:
        ConfigError: neither `rank` nor `energy` is given, or one is out of range.
        AdapterError: the adapter has updates of parameters (`target_parameters`), or was trained beside
            another weight than W0.

    Source: Eckart and Young, 1936: no matrix of a rank is nearer than the SVD cut to it.
    """
    if rank is None and energy is None:
        raise ConfigError("give rank or energy: how far to compress")
    if rank is not None:
        check_count("rank", rank)
    if energy is not None:
        check_share("energy", energy)
    check_no_parameters(Adapter.check(adapter))
    adapter.check_on_base("compress an adapter")
    factors = {}
    for path, f in adapter.factors.items():
        found = spectrum(*blocks_of_sum([(f, 1.0)]))
        k = _needed(found, 1.0 if energy is None else energy)
        limit = k if rank is None else per_group(rank, f, path)
        factors[path] = dataclasses.replace(found.cut(min(k, limit)).factors(f), magnitude=f.magnitude)
    config = describing(adapter.lora, factors)
    made = tied(adapter.lora, factors, [adapter])
    result = dataclasses.replace(adapter, config=config, factors=made, trained_as=None)
    return result, error(result, [adapter])


def per_group(rank: int, factors: Factors, path: str) -> int:
    """The rank of each group, if the whole update may have at most `rank`.

    Raises:
        ConfigError: a convolution has more groups than that.
    """
    if rank < factors.groups:
        raise ConfigError(
            f"{path} is a convolution in {factors.groups} groups; its rank must be at least that, not {rank}"
        )
    return rank // factors.groups


def _needed(found: Spectrum, energy: float) -> int:
    """The smallest rank per group with which all groups together keep this share of the energy."""
    squares = found.S.square().sum(0)
    # tail[k] is lost when k are kept; summed from the small end, or the smallest would vanish in the sum.
    tail = squares.flip(0).cumsum(0).flip(0)
    allowed = (1 - energy + torch.finfo(squares.dtype).eps) * squares.sum()
    return max(1, int((tail > allowed).sum()))
