"""Linear layers that lorica knows nothing about: subclasses with a forward of their own, quantized weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorica import functional
from lorica.layers.base import LoraLayer


class LoraOpaque(LoraLayer):
    """Any other subclass of `nn.Linear`: it keeps its own forward, and the update is added to what that returns."""

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B, from what the module says of itself: its weight may be packed."""
        assert isinstance(module, nn.Linear)
        return (r, module.in_features), (module.out_features, r)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer's own forward to ``(..., d_in)``, and add the active updates."""
        y = super().forward(x, *args, **kwargs)
        for name in self.acting():
            A, B, scale, p = self.update_of(name)
            # A quantized layer may take and return a lower precision than the factors; the input's is what they are cast to.
            y = y + functional.low_rank(x, A, B, scale, p).to(y.dtype)
        return y
