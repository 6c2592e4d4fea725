"""The effect of an update on W0's directions: the paper's table 7 and figure 8.

‖Uᵀ·W·V‖   the strength of W0 in r directions: the update's own, W0's strongest, random ones
‖ΔW‖ over the first of these is the amplification: how much the update strengthens what W0 does little of
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.adapter import Adapter
from lorica.config.checks import check_count, check_share
from lorica.errors import ConfigError
from lorica.study.directions import decompose, orthonormal, top_directions
from lorica.study.modules import Weight, base_weights
from lorica.study.results import Result
from lorica.study.subspaces import phi


@dataclass(frozen=True, eq=False)
class Amplification(Result):
    """One layer of the paper's table 7; all norms are Frobenius's.

    Args:
        r: number of directions.
        norm: ‖ΔW‖.
        weight_norm: ‖W‖.
        in_update: ‖UᵀWV‖ with U, V the leading r singular directions of ΔW.
        in_weight: the same with those of W itself: the largest possible value.
        in_random: the same with random directions, one draw.
        by_chance: the root mean square for random directions: ‖W‖·r/√(d_out·d_in).
        factor: ‖ΔW‖ / in_update; infinite if in_update is 0.
    """

    r: int
    norm: float
    weight_norm: float
    in_update: float
    in_weight: float
    in_random: float
    by_chance: float
    factor: float


@dataclass(frozen=True, eq=False)
class AmplificationReport(Result):
    """Table 7 for every layer.

    Args:
        layers: module path → its row.
    """

    layers: dict[str, Amplification]


@dataclass(frozen=True, eq=False)
class Overlap(Result):
    """The similarity of an update's directions and W's strongest; one panel of the paper's figure 8.

    Args:
        side: ``"input"``: right-singular vectors; ``"output"``: left ones.
        d: dimension of their space.
        phi: (i, j): φ of the first i directions of W and the first j of ΔW.
        random: the same with random directions instead of ΔW's.
    """

    side: str
    d: int
    phi: Tensor
    random: Tensor


@dataclass(frozen=True, eq=False)
class OverlapReport(Result):
    """Figure 8 for every layer.

    Args:
        layers: module path → its panel.
    """

    layers: dict[str, Overlap]


def projected_norm(
    W: Float[Tensor, "d_out d_in"], U: Float[Tensor, "d_out r"], V: Float[Tensor, "d_in r"]
) -> float:
    """‖Uᵀ·W·V‖ (Frobenius): the strength of W from the directions V to the directions U."""
    return float(torch.linalg.norm(U.to(W.dtype).mT @ W @ V.to(W.dtype)))


def amplification(
    adapter: Adapter, base: str | Path, *, rank: int | None = None, seed: int = 0
) -> AmplificationReport:
    """The factor by which each update exceeds W0 in the update's own directions.

    Args:
        adapter: the updates.
        base: folder, file of safetensors or Hub name of the base; its weights are read one at a time.
        rank: number of leading directions; None takes each update's rank.
        seed: of the random directions.

    Raises:
        AdapterError: the base does not fit the adapter, or an update is zero.
        ConfigError: the rank is less than 1.
        FileError: the base cannot be read.

    Source: Hu et al., 2021, §7.3, table 7.
    """
    if rank is not None:
        check_count("rank", rank)
    return AmplificationReport({w.path: amplified(w, rank, seed) for w in base_weights(adapter, base)})


def amplified(weight: Weight, rank: int | None = None, seed: int = 0) -> Amplification:
    """One layer's row of table 7."""
    W, draw = weight.W, torch.Generator().manual_seed(seed)
    update = decompose(weight.factors, weight.path)
    r = len(update.S) if rank is None else min(rank, len(update.S))
    _, S, _ = top_directions(W, r, draw)
    d_out, d_in = W.shape
    in_update = projected_norm(W, update.U[:, :r], update.Vh[:r].mT)
    norm, weight_norm = float(torch.linalg.norm(update.S)), float(torch.linalg.norm(W))
    return Amplification(
        r=r,
        norm=norm,
        weight_norm=weight_norm,
        in_update=in_update,
        in_weight=float(torch.linalg.norm(S)),
        in_random=projected_norm(W, orthonormal(d_out, r, draw), orthonormal(d_in, r, draw)),
        by_chance=weight_norm * r / math.sqrt(d_out * d_in),
        factor=norm / in_update if in_update else math.inf,
    )


WeightSide = Literal["input", "output"]
"""Singular vectors of W0 and ΔW: the right ones (inputs) or the left ones (outputs)."""


def overlap(
    adapter: Adapter,
    base: str | Path,
    *,
    side: WeightSide = "input",
    top: float = 0.1,
    seed: int = 0,
) -> OverlapReport:
    """The similarity of the updates' directions and the strongest of W0.

    Args:
        adapter: the updates.
        base: folder, file of safetensors or Hub name of the base; its weights are read one at a time.
        side: ``"input"``: right-singular vectors; ``"output"``: left ones.
        top: share of W0's directions to compare with, in (0, 1].
        seed: of the random directions.

    Raises:
        AdapterError: the base does not fit the adapter, or an update is zero.
        ConfigError: `side` or `top` is out of range.
        FileError: the base cannot be read.

    Source: Hu et al., 2021, appendix H.4, figure 8.
    """
    check_overlap(side, top)
    return OverlapReport({w.path: overlapped(w, side, top, seed) for w in base_weights(adapter, base)})


def overlapped(weight: Weight, side: WeightSide = "input", top: float = 0.1, seed: int = 0) -> Overlap:
    """One layer's panel of figure 8."""
    draw = torch.Generator().manual_seed(seed)
    update = decompose(weight.factors, weight.path)
    U, _, Vh = top_directions(weight.W, max(1, round(top * min(weight.W.shape))), draw)
    own, ours = (Vh.mT, update.Vh.mT) if side == "input" else (U, update.U)
    own = own.double()
    chance = orthonormal(len(ours), ours.shape[1], draw)
    return Overlap(side, len(ours), phi(own, ours), phi(own, chance))


def check_overlap(side: str, top: float) -> None:
    """Refuse values of `side` and `top` that are out of range."""
    if side not in ("input", "output"):
        raise ConfigError(f"side must be 'input' or 'output', not {side!r}")
    check_share("top", top, "a share of W0's directions")
