"""The rank that each layer's update uses: singular values, energy, effective and stable rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorica.adapter import Adapter, Factors
from lorica.config.checks import check_share
from lorica.study.directions import singular_values
from lorica.study.results import Result


@dataclass(frozen=True, eq=False)
class Spectrum(Result):
    """The spectrum of one layer's ``ΔW = scale·B·A``.

    Args:
        r: rank that it was trained with.
        shape: (d_out, d_in) of ΔW.
        values: its r singular values, the largest first.
        energy: share of ‖ΔW‖² (Frobenius) in the first 1, 2, ... r directions.
        effective_rank: exp of the entropy of the shares of energy: 1 if one direction has all of it, r if all
            have equal shares (Roy and Vetterli, 2007, on energies). 0 for a ΔW of zero.
        stable_rank: ‖ΔW‖² over the square of the largest singular value. 0 for a ΔW of zero.
        norm: ‖ΔW‖ (Frobenius).
    """

    r: int
    shape: tuple[int, int]
    values: tuple[float, ...]
    energy: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    norm: float

    def needed(self, energy: float = 0.99) -> int:
        """The smallest rank with that share of the energy; 0 for a ΔW of zero.

        Raises:
            ConfigError: the share is not in (0, 1].
        """
        check_share("energy", energy)
        if not self.norm:
            return 0
        # Rounding alone can leave the sum this far below 1.
        enough = energy - len(self.values) * torch.finfo(torch.float64).eps
        return next(i for i, share in enumerate(self.energy, 1) if share >= enough)


@dataclass(frozen=True, eq=False)
class SpectrumReport(Result):
    """An adapter's spectra.

    Args:
        layers: module path → its spectrum.
    """

    layers: dict[str, Spectrum]

    def __str__(self) -> str:
        """One line per layer, in the adapter's order."""
        rows = [
            f"  {s.effective_rank:5.1f} of {s.r:<4} {s.needed():>4} for 99 %  norm {s.norm:9.3g}  {path}"
            for path, s in self.layers.items()
        ]
        return "\n".join(["effective rank:", *rows])


def spectrum(adapter: Adapter) -> SpectrumReport:
    """Singular values, energy, effective and stable rank of each layer's update.

    From the factors alone: two thin QR and the SVD of an r × r matrix, in float64. DoRA's magnitudes and a
    bias on B do not count; the values of a grouped convolution are those of all its groups.

    Raises:
        AdapterError: an update holds NaN or infinity.

    Source: Hu et al., 2021, §7.2.
    """
    held = Adapter.check(adapter).factors
    return SpectrumReport({path: of_layer(factors, path) for path, factors in held.items()})


def of_layer(factors: Factors, path: str = "the update") -> Spectrum:
    """The spectrum of one update."""
    S = singular_values(factors, path)
    squares = S.square()
    total = squares.sum()
    shape = factors.B.shape[0], factors.A[0].numel() * factors.groups
    if not total:
        zeros = (0.0,) * len(S)
        return Spectrum(factors.r, shape, zeros, zeros, 0.0, 0.0, 0.0)
    shares = squares / total
    entropy = -torch.xlogy(shares, shares).sum()
    return Spectrum(
        r=factors.r,
        shape=shape,
        values=tuple(S.tolist()),
        energy=tuple((squares.cumsum(0) / total).tolist()),
        effective_rank=float(entropy.exp()),
        stable_rank=float(total / squares[0]),
        norm=float(total.sqrt()),
    )
