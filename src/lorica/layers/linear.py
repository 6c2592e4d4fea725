"""Linear layers: torch's own, and transformers' Conv1D."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lorica import functional
from lorica.layers.base import LoraLayer
from lorica.layers.kinds import RULES
from lorica.layers.variants import PLAIN


class LoraLinear(LoraLayer):
    """A linear layer: ``W0·x + b + Σ scale·B·A·dropout(x)``."""

    bias: Tensor | None
    reads: ClassVar[tuple[str, ...]] = ("bias",)

    def base(self) -> tuple[Tensor, Tensor | None]:
        """W0 as (d_out, d_in), and the bias."""
        try:
            bias = self._parameters["bias"]
        except KeyError:
            bias = self.computed("bias")
        return self.as_matrix(self.base_weight), bias

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(..., d_in)``; returns ``(..., d_out)``."""
        names = self.acting()
        rows = self.adapter_state.rows
        if rows is not None:
            y = rows.linear(self, input)
            return super().forward(input) if y is None else y
        if len(names) != 1:
            return super().forward(input) if names else self.base_forward(input)
        variant = self.variants[names[0]]
        if variant is not PLAIN:
            y = variant.linear(self, names[0], input)
            return super().forward(input) if y is None else y
        weight, bias = self.base()
        return functional.lora_linear(input, weight, bias, *self.update_of(names[0]))

    def base_forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``W0·x + b``, whatever the attribute `weight` shows."""
        return F.linear(input, *self.base())

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x, self.as_matrix(weight))

    def update(self, name: str, x: Tensor) -> Tensor:  # noqa: D102
        return functional.low_rank(x, *self.update_of(name))


class LoraConv1D(LoraLinear):
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored (d_in, d_out)."""

    transposed: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `LoraLinear.forward`; transformers calls the input x."""
        return super().forward(x)


def conv1d_class() -> Any:
    """The Conv1D of transformers; an empty tuple where it was not imported, which would take seconds."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return () if pytorch_utils is None else pytorch_utils.Conv1D


def _conv1d(found: type[LoraLayer] | None, module: nn.Module) -> type[LoraLayer] | None:
    kind = conv1d_class()
    return LoraConv1D if isinstance(module, kind) and type(module).forward is kind.forward else found


RULES.append(_conv1d)
