"""What rounding takes from an update that is merged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lorica.errors import listing
from lorica.layers import LoraLayer, LoraParameters
from lorica.layers.quantized import holding


@dataclass(frozen=True)
class MergeReport:
    """What rounding cost.

    Args:
        names: adapters that were merged.
        layers: module path → ‖stored − (W0 + ΔW)‖ / ‖ΔW‖ (Frobenius): the share of the update that rounding
            to the weight's dtype took away or added. 0 is exact, 1 as good as all of it.
        untied: modules that shared a parameter, and now have one each.
    """

    names: tuple[str, ...]
    layers: dict[str, float]
    untied: list[str] = field(default_factory=list)

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost most, and its share."""
        return max(self.layers.items(), key=lambda item: item[1], default=("", 0.0))

    def __str__(self) -> str:
        """A line for each layer, the worst first."""
        merged = f"merged {listing(self.names)} into {len(self.layers)} layers"
        rows = sorted(self.layers.items(), key=lambda item: -item[1])
        tail = [f"no longer tied: {listing(self.untied)}"] if self.untied else []
        return "\n".join(
            [
                f"{merged}; share of each update lost to rounding:",
                *(f"  {loss:9.2e}  {path}" for path, loss in rows),
                *tail,
            ]
        )


def rounding_loss(layer: LoraLayer, names: Iterable[str], stored: Tensor, *, rows: int = 1024) -> float:
    """‖stored − (W0 + ΔW)‖ / ‖ΔW‖ in float64, a block of rows at a time.

    Args:
        layer: adapted layer that still holds W0.
        names: adapters whose updates make up ΔW.
        stored: what is to take W0's place, of W0's shape.
        rows: of a block; bounds the memory.
    """
    W = stored.detach().flatten(1)
    products = [
        (name, *layer.product(name, torch.float64), layer.scaling[name], layer.ratio(name, torch.float64))
        for name in names
        if name in layer.scaling
    ]
    lost = total = 0.0
    for i in range(0, W.shape[0], rows):
        part = slice(i, i + rows)
        base = layer.base_rows(part, torch.float64)
        delta = torch.zeros_like(base)
        for name, left, right, scale, ratio in products:
            update = scale * (left[part] @ right)
            if ratio is not None:
                ratio = layer.along_rows(ratio.detach())
                ratio = ratio if layer.transposed else ratio[part]
                own = layer.rows_beside(name, part, torch.float64)
                update = ratio * (own + update) - own
            delta += update
        lost += float((W[part].double() - base - delta).square().sum())
        total += float(delta.square().sum())
    return (lost / total) ** 0.5 if total else 0.0


def state_loss(layer: LoraLayer, names: tuple[str, ...], state: dict[str, Any]) -> float:
    """`rounding_loss` of what `merged_states` returned."""
    if isinstance(layer, LoraParameters):
        lost, total = layer.lost(names, state)
        return (lost / total) ** 0.5 if total else 0.0
    weight = state[layer.weight_name]
    if type(weight) is not Parameter:
        with holding(layer, state):
            weight = layer.base_rows(slice(None), layer.precision)
    return rounding_loss(layer, names, weight)
