"""Similarity of the directions of two updates: the paper's subspace similarity φ, and its level of chance.

    φ(i, j) = ‖U₁..ᵢᵀ · V₁..ⱼ‖² / min(i, j)        1: the smaller span is inside the other; 0: orthogonal

For random directions in d dimensions the expected φ is max(i, j) / d. Directions are those of ΔW = scale·B·A
itself by default: any B·G⁻¹ and G·A make the same ΔW, but A alone orders its directions in another way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.adapter import Adapter, Factors
from lorica.config.checks import check_count
from lorica.errors import AdapterError, ConfigError, lines, listing, nearest
from lorica.study.directions import Side, directions, orthonormal
from lorica.study.results import Result


def phi(U: Float[Tensor, "d i"], V: Float[Tensor, "d j"]) -> Float[Tensor, "i j"]:
    """Similarity of the spans of the first columns of U and of V, for all numbers of columns.

    Args:
        U: orthonormal columns, the most important first.
        V: the same, of the same dimension.

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
    """The mean of φ(i, j) for random directions: max(i, j) / d."""
    return max(i, j) / d


def projection_distance(similarity: float, i: int, j: int) -> float:
    """The projection metric d between two spans, from their similarity: φ = 1 − d²/p with p = min(i, j).

    The paper prints φ = (1 − d²)/p, which contradicts its own definitions.

    Source: Hu et al., 2021, appendix G; Ham and Lee, 2008.
    """
    return (min(i, j) * (1 - similarity)) ** 0.5


@dataclass(frozen=True, eq=False)
class Similarity(Result):
    """The similarity of two updates' leading directions.

    Args:
        one: name of the first.
        other: name of the second.
        side: the kind of directions.
        d: dimension of their space.
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
            ConfigError: an update has fewer directions.
        """
        rows, columns = self.phi.shape
        if not (1 <= i <= rows and 1 <= j <= columns):
            raise ConfigError(
                f"φ({i}, {j}) of {self.one} and {self.other}: they have {rows} and {columns} directions"
            )
        return float(self.phi[i - 1, j - 1])

    def by_chance(self, i: int, j: int) -> float:
        """The mean of φ(i, j) if both were random."""
        return expected_phi(self.d, i, j)


@dataclass(frozen=True, eq=False)
class SimilarityReport(Result):
    """Two adapters, layer by layer.

    Args:
        layers: module path → similarity of the two updates of that module.
        notes: modules that could not be compared, with the reasons, and remarks on the result.
    """

    layers: dict[str, Similarity]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LayerCorrelation(Result):
    """The similarity of every two of one adapter's updates.

    Args:
        side: the kind of directions.
        paths: the modules.
        rank: number of leading directions compared, or all of an update that has fewer.
        phi: (paths, paths): φ(rank, rank); NaN for two whose spaces differ in dimension.
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
        side: the kind of directions.
        names: of the two, for messages and the result.

    Raises:
        AdapterError: their spaces differ in dimension, or one has no directions.
        ConfigError: `side` has another value.
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
    """Similarity of two adapters (of two seeds, ranks or tasks) in each layer that both have.

    Args:
        one: an adapter.
        other: another; ranks and targets may differ, and only common layers are compared.
        side: the kind of directions.
        paths: the modules to compare; None takes all that can be compared.

    Returns:
        The similarity per layer; the notes name the modules left out.

    Raises:
        AdapterError: nothing can be compared, or a named module cannot; with the reasons.
        ConfigError: `side` has another value.

    Source: Hu et al., 2021, §7.2, figures 3 and 4.
    """
    problems: dict[str, str] = {}
    layers: dict[str, Similarity] = {}
    one, other = Adapter.check(one), Adapter.check(other)
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
        raise AdapterError(f"some of the named modules cannot be compared:\n{lines(problems.values())}")
    notes = [*_of_bases(one, other), *_of_targets(one, other), *problems.values()]
    if not (one.factors or other.factors):
        notes.append("neither has a low-rank update")
    if not layers:
        raise AdapterError(f"the two adapters have no layer that can be compared:\n{lines(notes)}")
    return SimilarityReport(layers, tuple(notes))


def correlation(adapter: Adapter, *, side: Side = "input", rank: int | None = None) -> LayerCorrelation:
    """φ between every two layers of one adapter: layers that read the same directions of the residual stream.

    Args:
        adapter: the adapter.
        side: the kind of directions.
        rank: number of leading directions of each; None takes the lowest rank of a layer.

    Raises:
        AdapterError: an update has no directions, or there is no update.
        ConfigError: the rank is less than 1, or `side` has another value.

    Source: Hu et al., 2021, appendix H.1.
    """
    if rank is not None:
        check_count("rank", rank)
    bases = {path: directions(f, side, path) for path, f in Adapter.check(adapter).factors.items()}
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
