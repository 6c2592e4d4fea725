"""Linear layers that lorica knows nothing about: a forward of their own, quantized weights."""

from __future__ import annotations

from torch import Tensor, nn

from lorica import functional
from lorica.errors import StateError
from lorica.layers.base import LoraLayer


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
            StateError: the weight is packed.
        """
        if not self.base_weight.is_floating_point():
            raise StateError(
                f"a quantized {self.base_class.__name__}, whose weight cannot take an update; merge into the "
                "original base"
            )
