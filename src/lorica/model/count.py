"""Count the parameters that train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorica.layers import SavedModule
from lorica.layers.quantized import numel
from lorica.tree import walk


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, by two conventions.

    Args:
        trainable: parameters that train.
        total: all parameters, including the frozen originals of modules trained whole: PEFT's convention.
        deployed: the parameters that the finished model needs, without those originals, as papers often
            quote them.
    """

    trainable: int
    total: int
    deployed: int

    @property
    def percent(self) -> float:
        """Share of `total` that trains, in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        """As PEFT's `print_trainable_parameters` prints it."""
        return (
            f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || trainable%: "
            f"{self.percent:.4f}"
        )


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters; each tensor once, however often it is tied.

    Args:
        model: any model, adapted or not; on the meta device too.
    """
    parameters = {id(p): p for p in model.parameters()}
    originals = {
        id(p): p
        for outer in walk(model)
        if isinstance(outer.module, SavedModule)
        for place in walk(outer.module)
        for p in place.module.parameters(recurse=False)
    }
    total = sum(numel(p) for p in parameters.values())
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters.values() if p.requires_grad),
        total=total,
        deployed=total - sum(numel(p) for p in originals.values()),
    )
