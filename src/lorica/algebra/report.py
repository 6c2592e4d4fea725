"""The error of an adapter made from others: its distance from their sum."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorica.adapter import Adapter
from lorica.algebra.spectrum import blocks_of_sum, norm
from lorica.algebra.terms import Terms


class LayerError(NamedTuple):
    """One layer's error.

    Args:
        error: ‖Δ' − Δ‖ / ‖Δ‖ (Frobenius); infinite if Δ is zero and Δ' is not.
        norm: ‖Δ‖.
        rank: of Δ'.
    """

    error: float
    norm: float
    rank: int


@dataclass(frozen=True)
class ErrorReport:
    """The distance of an adapter's updates Δ' from the updates Δ that it approximates.

    Args:
        layers: module path → its error.
    """

    layers: dict[str, LayerError]

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest relative error, and that error."""
        return max(((path, e.error) for path, e in self.layers.items()), key=lambda item: item[1])

    @property
    def mean(self) -> float:
        """Mean over the layers of their relative errors."""
        return statistics.fmean(layer.error for layer in self.layers.values())

    @property
    def energy(self) -> float:
        """1 − Σ‖Δ' − Δ‖² / Σ‖Δ‖² over all layers: for a compressed adapter, the share of energy it keeps."""
        total = sum(layer.norm**2 for layer in self.layers.values())
        if total == 0:
            return 1.0 if self.mean == 0 else -math.inf
        lost = sum((e.error * e.norm) ** 2 if e.norm else e.error for e in self.layers.values())
        return 1 - lost / total

    def __str__(self) -> str:
        """One line per layer, the worst first."""
        rows = sorted(self.layers.items(), key=lambda item: -item[1].error)
        worst, mean = f"worst {self.worst[1]:.2e}", f"mean {self.mean:.2e}"
        head = f"relative error of the update in {len(rows)} layers: {worst}, {mean}"
        return "\n".join([f"{head}:", *(f"  {e.error:9.2e}  rank {e.rank:<4} {path}" for path, e in rows)])


def error(
    adapter: Adapter, adapters: Sequence[Adapter], weights: Sequence[float] | None = None
) -> ErrorReport:
    """The distance of an adapter from a weighted sum of others, without forming an update.

    Only B·A counts: not magnitudes (DoRA), biases on B, heads or the base's biases.

    Args:
        adapter: the adapter to measure.
        adapters: the adapters in the sum; for a compressed adapter, the one it was made from.
        weights: of the adapters in the sum; None takes 1 for each.

    Returns:
        The error of each layer that any of the adapters has; a layer that an adapter lacks counts as zero.

    Raises:
        AdapterError: their layers differ in kind or shape.
        ConfigError: there are not as many finite weights as adapters.
    """
    reference = Terms.of(adapters, weights)
    both = Terms.of([*reference.adapters, adapter], [*reference.weights, -1.0])
    both.check_layers()
    layers = {}
    for path in both.paths:
        size = norm(*blocks_of_sum(terms)) if (terms := reference.at(path)) else 0.0
        off = norm(*blocks_of_sum(both.at(path)))
        relative = off / size if size else math.inf if off else 0.0
        layers[path] = LayerError(relative, size, adapter.factors[path].r if path in adapter.factors else 0)
    return ErrorReport(layers)
