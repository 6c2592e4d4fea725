"""Linear layers that lorica knows nothing about: a forward of their own, quantized weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica import functional
from lorica.errors import StateError
from lorica.layers.base import LoraLayer
from lorica.layers.probe import check_multiplies, has_own_forward


class LoraOpaque(LoraLayer):
    """Any other subclass of `nn.Linear`; the update is added to what its own forward returns."""

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B, from what the module says of itself: its weight may be packed."""
        assert isinstance(module, nn.Linear)
        return (r, module.in_features), (module.out_features, r)

    def update(self, name: str, x: Tensor) -> Tensor:  # noqa: D102
        return functional.low_rank(x, *self.update_of(name))

    def check_mergeable(self) -> None:
        """As `LoraLayer.check_mergeable`.

        Raises:
            StateError: the weight is packed, or the forward does more than multiply by it.
        """
        if not self.base_weight.is_floating_point():
            raise StateError(
                f"a quantized {self.base_class.__name__}, whose weight cannot take an update; merge into the "
                "original base"
            )
        if has_own_forward(self.base_class):
            x = torch.randn(4, self.factor_shapes(self, 1)[0][1], dtype=self.base_weight.dtype)
            check_multiplies(self, x.to(self.base_weight.device), F.linear)
