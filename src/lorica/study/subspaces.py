"""Do two updates work in the same directions? The paper's subspace similarity φ, and its random level.

    φ(i, j) = ‖U₁..ᵢᵀ · V₁..ⱼ‖² / min(i, j)        1: the smaller span is inside the other; 0: orthogonal

For random directions in d dimensions the expected φ is max(i, j) / d. Directions are those of ΔW = scale·B·A
itself unless said otherwise: any B·G⁻¹ and G·A make the same ΔW, and A alone orders its directions otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.adapter import Adapter, Factors
from lorica.errors import AdapterError, ConfigError, lines, listing, nearest
from lorica.study.directions import Side, directions, orthonormal
from lorica.study.results import Result


def phi(U: Float[Tensor, "d i"], V: Float[Tensor, "d j"]) -> Float[Tensor, "i j"]:
    """Similarity of the spans of the first columns of U and of V, for all numbers of columns.

    Args:
        U: orthonormal columns, the most important first.
        V: the same, of as many dimensions.

    Returns:
        φ(i, j) at [i − 1, j − 1], in [0, 1].

    Source: Hu et al., 2021, eq. 4.
    """
    squares = (U.mT @ V).square()
    count = torch.arange(1, max(squares.shape) + 1, dtype=squares.dtype)
    smaller = torch.minimum(count[: squares.shape[0], None], count[None, : squares.shape[1]])
    return (squares.cumsum(0).cumsum(1) / smaller).clamp(0, 1)


def random_phi(d: int, i: int, j: int, *, seed: int = 0) -> Float[Tensor, "i j"]:
    """φ of two draws of random Gaussian directions: the level of chance, as the paper shows it (figure 4)."""
    draw = torch.Generator().manual_seed(seed)
    return phi(orthonormal(d, i, draw), orthonormal(d, j, draw))


def expected_phi(d: int, i: int, j: int) -> float:
    """What φ(i, j) of random directions is on average: max(i, j) / d."""
    return max(i, j) / d


def projection_distance(similarity: float, i: int, j: int) -> float:
    """The projection metric d between two spans, from their similarity: φ = 1 − d²/p with p = min(i, j).

    The paper prints φ = (1 − d²)/p, which contradicts its own definitions.

    Source: Hu et al., 2021, appendix G; Ham and Lee, 2008.
    """
    return (min(i, j) * (1 - similarity)) ** 0.5


@dataclass(frozen=True, eq=False)
class Similarity(Result):
    """How far two updates share their leading directions.

    Args:
        one: the first, by its name.
        other: the second.
        side: directions of what.
        d: dimensions of the space they are in.
        phi: (i, j): φ of the first i directions of one and the first j of the other.
    """

    one: str
    other: str
    side: str
    d: int
    phi: Tensor

    def at(self, i: int, j: int) -> float:
        """φ(i, j), counted from 1.

        Raises:
            ConfigError: they do not have so many directions.
        """
        rows, columns = self.phi.shape
        if not (1 <= i <= rows and 1 <= j <= columns):
            raise ConfigError(
                f"φ({i}, {j}) of {self.one} and {self.other}: they have {rows} and {columns} directions"
            )
        return float(self.phi[i - 1, j - 1])

    def by_chance(self, i: int, j: int) -> float:
        """What φ(i, j) would be on average if both were random."""
        return expected_phi(self.d, i, j)


@dataclass(frozen=True, eq=False)
class SimilarityReport(Result):
    """Two adapters, layer by layer.

    Args:
        layers: module path → similarity of the two updates of that module.
        notes: what could not be compared and why, and what to keep in mind.
    """

    layers: dict[str, Similarity]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LayerCorrelation(Result):
    """One adapter's updates, each with each.

    Args:
        side: directions of what.
        paths: the modules.
        rank: how many leading directions of each are compared, or all where there are fewer.
        phi: (paths, paths): φ(rank, rank); NaN where two are of spaces of different dimensions.
    """

    side: str
    paths: tuple[str, ...]
    rank: int
    phi: Tensor


def compare(
    one: Factors, other: Factors, *, side: Side = "input", names: tuple[str, str] = ("one", "other")
) -> Similarity:
    """Similarity of any two updates: of two adapters, two projections or two layers; ranks may differ.

    Args:
        one: an update.
        other: another.
        side: directions of what.
        names: of the two, for messages and the result.

    Raises:
        AdapterError: the directions are of spaces of different dimensions, or one has none.
        ConfigError: there is no such side.
    """
    U, V = directions(one, side, names[0]), directions(other, side, names[1])
    if len(U) != len(V):
        raise AdapterError(
            f"{names[0]} and {names[1]} cannot be compared by {side}: the directions of one have {len(U)} "
            f"dimensions, those of the other {len(V)}"
        )
    return Similarity(*names, side, len(U), phi(U, V))


def similarity(
    one: Adapter, other: Adapter, *, side: Side = "input", paths: Iterable[str] | None = None
) -> SimilarityReport:
    """Similarity of two adapters in each layer that both have: two seeds, two ranks, two tasks.

    Args:
        one: an adapter.
        other: another; ranks and targets may differ, and only what both have is compared.
        side: directions of what.
        paths: the modules to compare; None takes all that can be.

    Returns:
        Layer by layer; the notes say what was left out.

    Raises:
        AdapterError: nothing can be compared, or a module that was named cannot; with the reasons.
        ConfigError: there is no such side.

    Source: Hu et al., 2021, §7.2, figures 3 and 4.
    """
    problems: dict[str, str] = {}
    layers: dict[str, Similarity] = {}
    wanted = list(paths) if paths is not None else [path for path in one.factors if path in other.factors]
    for path in wanted:
        if missing := [name for name, a in (("one", one), ("other", other)) if path not in a.factors]:
            near = nearest(path, [*one.factors, *other.factors])
            problems[path] = f"{path}: {' and '.join(missing)} has no update for it{near}"
            continue
        try:
            layers[path] = compare(one.factors[path], other.factors[path], side=side, names=(path, path))
        except AdapterError as error:
            problems[path] = str(error)
    if problems and paths is not None:
        raise AdapterError(f"what was named cannot all be compared:\n{lines(problems.values())}")
    notes = [*_of_bases(one, other), *_of_targets(one, other), *problems.values()]
    if not layers:
        raise AdapterError(f"the two adapters have no layer that can be compared:\n{lines(notes)}")
    return SimilarityReport(layers, tuple(notes))


def correlation(adapter: Adapter, *, side: Side = "input", rank: int | None = None) -> LayerCorrelation:
    """φ between all layers of one adapter: which read the same directions of the residual stream.

    Args:
        adapter: what to look at.
        side: directions of what.
        rank: how many leading directions of each; None takes the smallest rank there is.

    Raises:
        AdapterError: an update has no directions, or there is no update.
        ConfigError: the rank is less than 1, or there is no such side.

    Source: Hu et al., 2021, appendix H.1.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")
    bases = {path: directions(f, side, path) for path, f in adapter.factors.items()}
    if not bases:
        raise AdapterError("the adapter has no factors, so there are no layers to compare")
    rank = min(U.shape[1] for U in bases.values()) if rank is None else rank
    found = torch.full((len(bases), len(bases)), torch.nan, dtype=torch.float64)
    cut = [U[:, :rank] for U in bases.values()]
    for i, U in enumerate(cut):
        for j, V in enumerate(cut[: i + 1]):
            if len(U) == len(V):
                shared = (U.mT @ V).square().sum() / min(U.shape[1], V.shape[1])
                found[i, j] = found[j, i] = shared.clamp(0, 1)
    return LayerCorrelation(side, tuple(bases), rank, found)


def _of_bases(one: Adapter, other: Adapter) -> Sequence[str]:
    bases = [a.config.base_model_name_or_path for a in (one, other)]
    if None in bases or bases[0] == bases[1]:
        return []
    return [
        f"their bases differ ({bases[0]} and {bases[1]}): unless one was made from the other, what they "
        "share means nothing"
    ]


def _of_targets(one: Adapter, other: Adapter) -> Sequence[str]:
    notes = []
    for name, mine, theirs in (("the first", one, other), ("the second", other, one)):
        if alone := [path for path in mine.factors if path not in theirs.factors]:
            notes.append(f"only {name} adapts {listing(alone, limit=6)}")
    return notes
