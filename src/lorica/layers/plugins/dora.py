"""DoRA: a trained magnitude per output (`use_dora`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica import functional
from lorica.layers.variants import Variant, register


class Dora(Variant):
    """A trained magnitude per output: rows of ``W0 + scale·B·A`` are rescaled to that norm.

    Source: Liu et al., 2024, §4.
    """

    name: ClassVar[str] = "dora"

    def effect(self, layer: Any, name: str, x: Tensor, base: Tensor) -> Tensor:  # noqa: D102
        update = layer.update(name, x).to(base.dtype)
        ratio, bias = (
            layer.along_outputs(self.ratio(layer, name).to(base.dtype)),
            getattr(layer, "bias", None),
        )
        own = layer.weight_beside(name)
        if own is not None:
            without_bias = layer.multiply(x, own).to(base.dtype)
        else:
            without_bias = base if bias is None else base - layer.along_outputs(bias.to(base.dtype))
        return ratio * update + (ratio - 1) * without_bias

    def linear(self, layer: Any, name: str, x: Tensor) -> Tensor | None:  # noqa: D102
        if layer.weight_beside(name) is not None:
            return None
        weight, bias = layer.base()
        y = functional.lora_linear(x, weight, bias, *layer.update_of(name))
        return self.rescaled(y, self.ratio(layer, name), bias)

    def weight(self, layer: Any, name: str, W0: Tensor, folded: Tensor, rows: slice) -> Tensor:  # noqa: D102
        return self.turning(layer, name, folded.dtype)(W0, folded, rows)

    def turning(self, layer: Any, name: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, slice], Tensor]:  # noqa: D102
        ratio = layer.along_rows(self.ratio(layer, name, dtype).to(dtype))
        return lambda W0, folded, rows: folded * (ratio if layer.transposed else ratio[rows])

    @staticmethod
    def rescaled(y: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
        """``ratio ⊙ (W0·x + s·B·A·x) + b`` of a linear layer, from ``y = W0·x + s·B·A·x + b`` (eq. 5)."""
        ratio = ratio.to(y.dtype)
        if bias is None:
            return y * ratio
        # The bias passes the ratio and its rest is added: at a ratio of 1 this is the base's output, bit for
        # bit. A bias added afterwards would be rounded otherwise than the base's kernel rounds it.
        return torch.addcmul(bias.to(y.dtype) * (1 - ratio), y, ratio)

    def ratio(self, layer: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Magnitude over norm per row of ``W0 + scale·B·A`` (d_out,)."""
        *factors, scale, _ = layer.update_of(name)
        A, B = (factor.flatten(1).to(dtype or factor.dtype) for factor in factors)
        magnitude = layer.magnitude_parameter(name)
        return magnitude / layer.row_norm(layer, A, B, scale, layer.weight_beside(name))


DORA = Dora()
register(DORA)
