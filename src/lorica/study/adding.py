"""Do adapters that one means to add get into each other's way?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorica.adapter import Adapter, Factors
from lorica.errors import AdapterError, ConfigError, lines
from lorica.study.directions import Update, decompose
from lorica.study.results import Result


@dataclass(frozen=True, eq=False)
class Interference(Result):
    """Two updates of one layer.

    Args:
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖): 1 where they do the same, −1 where they undo each other, 0 where
            their sum is as long as if they had nothing to do with each other.
        reads: share of ΔW₁'s energy on inputs that ΔW₂ reads too, by how strongly; in [0, 1].
        writes: the same of the outputs that they write to.
    """

    cosine: float
    reads: float
    writes: float


@dataclass(frozen=True, eq=False)
class InterferenceReport(Result):
    """Each two of several adapters.

    Args:
        pairs: ``"one + other"`` → module path → what the two do to each other there.
        notes: what could not be compared, and why.
    """

    pairs: dict[str, dict[str, Interference]]
    notes: tuple[str, ...] = ()

    def mean(self, pair: str) -> Interference:
        """A pair's mean over its layers."""
        layers = list(self.pairs[pair].values())
        return Interference(
            *(sum(getattr(x, name) for x in layers) / len(layers) for name in ("cosine", "reads", "writes"))
        )


def interference(adapters: Mapping[str, Adapter]) -> InterferenceReport:
    """What each two of several adapters would do to each other if they were added.

    From the factors: inner products of r × r. A layer that only one of them has cannot interfere.

    Args:
        adapters: two or more, by name.

    Raises:
        AdapterError: no two of them share a layer; with the reasons.
        ConfigError: there are fewer than two.
    """
    if len(adapters) < 2:
        raise ConfigError(f"interference is between two adapters or more, and there is {len(adapters)}")
    pairs: dict[str, dict[str, Interference]] = {}
    notes: list[str] = []
    for (name, one), (other_name, other) in itertools.combinations(adapters.items(), 2):
        layers, problems = {}, []
        for path in (path for path in one.factors if path in other.factors):
            try:
                layers[path] = between(one.factors[path], other.factors[path], path)
            except AdapterError as error:
                problems.append(f"{name} + {other_name}: {error}")
        if layers:
            pairs[f"{name} + {other_name}"] = layers
        elif not problems:
            problems = [
                f"{name} + {other_name}: no module is adapted by both, so neither is in the other's way"
            ]
        notes += problems
    if not pairs:
        raise AdapterError(f"there is nothing to compare:\n{lines(notes)}")
    return InterferenceReport(pairs, tuple(notes))


def between(one: Factors, other: Factors, path: str = "the update") -> Interference:
    """What two updates of one layer do to each other.

    Raises:
        AdapterError: they are of different shapes, or one is zero.
    """
    first, second = decompose(one, path), decompose(other, path)
    shapes = [(len(u.U), u.Vh.shape[1]) for u in (first, second)]
    if shapes[0] != shapes[1]:
        raise AdapterError(f"{path}: one update is {shapes[0]}, the other {shapes[1]}")
    U, V = first.U.mT @ second.U, first.Vh @ second.Vh.mT
    inner = (first.S[:, None] * U * second.S[None]).mul(V).sum()
    size = torch.linalg.norm(first.S) * torch.linalg.norm(second.S)
    return Interference(float(inner / size), _shared(first, second, V), _shared(first, second, U))


def _shared(first: Update, second: Update, cosines: torch.Tensor) -> float:
    """How much of two sets of weighted directions is common: 1 for the same, 0 for orthogonal ones."""
    ours, theirs = first.S.square(), second.S.square()
    both = (ours[:, None] * cosines.square() * theirs[None]).sum()
    return float(both / (torch.linalg.norm(ours) * torch.linalg.norm(theirs)))
