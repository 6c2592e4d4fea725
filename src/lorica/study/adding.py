"""Interference between adapters that are to be added."""

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
    """The interference of two updates of one layer.

    Args:
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖): 1 if they do the same, −1 if they undo each other, 0 if they are
            orthogonal.
        reads: overlap of the inputs that the two read, weighted by energy; in [0, 1].
        writes: the same for the outputs that they write to.
    """

    cosine: float
    reads: float
    writes: float


@dataclass(frozen=True, eq=False)
class InterferenceReport(Result):
    """The interference of every two of several adapters.

    Args:
        pairs: ``"one + other"`` → module path → the interference of the two there.
        notes: pairs and layers that could not be compared, with the reasons.
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
    """Measure the interference of every two of several adapters, if they were added.

    From the factors, by r × r products. A layer that only one of two adapters has does not interfere.

    Args:
        adapters: name → adapter; two or more.

    Raises:
        AdapterError: no two of them share a layer; with the reasons.
        ConfigError: there are fewer than two adapters.
    """
    if not isinstance(adapters, Mapping) or len(adapters) < 2:
        got = len(adapters) if isinstance(adapters, Mapping) else f"a {type(adapters).__name__}"
        raise ConfigError(f"interference needs two adapters or more, and got {got}")
    for adapter in adapters.values():
        Adapter.check(adapter)
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
            problems = [f"{name} + {other_name}: no module is adapted by both, so they do not interfere"]
        notes += problems
    if not pairs:
        raise AdapterError(f"there is nothing to compare:\n{lines(notes)}")
    return InterferenceReport(pairs, tuple(notes))


def between(one: Factors, other: Factors, path: str = "the update") -> Interference:
    """The interference of two updates of one layer.

    Raises:
        AdapterError: their shapes differ, or one is zero.
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
    """The overlap of two sets of weighted directions: 1 for equal ones, 0 for orthogonal ones."""
    ours, theirs = first.S.square(), second.S.square()
    both = (ours[:, None] * cosines.square() * theirs[None]).sum()
    return float(both / (torch.linalg.norm(ours) * torch.linalg.norm(theirs)))
