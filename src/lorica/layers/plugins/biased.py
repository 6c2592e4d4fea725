"""A bias on B (`lora_bias`)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lorica import functional
from lorica.layers.variants import Plain, register


class Biased(Plain):
    """A trained bias b on B: ``scale·b`` is added to every output (`lora_bias`)."""

    name: ClassVar[str] = "biased"

    def effect(self, layer: Any, name: str, x: Tensor, base: Tensor) -> Tensor:  # noqa: D102
        shift = self.shift(layer, name).to(base.dtype)
        return super().effect(layer, name, x, base) + layer.along_outputs(shift)

    def linear(self, layer: Any, name: str, x: Tensor) -> Tensor:  # noqa: D102
        (weight, bias), shift = layer.base(), self.shift(layer, name)
        bias = shift.to(weight.dtype) if bias is None else bias + shift.to(bias.dtype)
        return functional.lora_linear(x, weight, bias, *layer.update_of(name))

    def shift(self, layer: Any, name: str) -> Tensor:
        """``scale·b`` (d_out,)."""
        return layer.scaling[name] * layer.bias_parameter(name)


BIASED = Biased()
register(BIASED)
