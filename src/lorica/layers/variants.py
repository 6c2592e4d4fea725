"""How an adapter forms a layer's output and weight: plain, DoRA, or with a bias on B.

    plain    y + s·B·A·x                         W0 + s·B·A
    DoRA     m/‖W‖ · (W·x),  W = W0 + s·B·A      m/‖W‖ · W        (by rows)
    biased   y + s·(B·A·x + b)                   W0 + s·B·A, and s·b on the layer's bias

A variant is a class with two methods, `Variant.effect` and `Variant.weight`, registered under its value of
`LoraConfig.variant`; DoRA and the bias have fields of their own there, as in PEFT.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica.errors import ConfigError, listing, nearest

VARIANTS: dict[str, Variant] = {}
"""Name → variant."""


def register(variant: Variant) -> Variant:
    """Make a variant known by its name, as a value of `LoraConfig.variant`."""
    VARIANTS[variant.name] = variant
    return variant


def of(name: str) -> Variant:
    """The variant with this name.

    Raises:
        ConfigError: no variant has it.
    """
    if name not in VARIANTS:
        have = listing(map(repr, VARIANTS))
        raise ConfigError(f"variant={name!r} is not registered{nearest(name, VARIANTS)}; there are: {have}")
    return VARIANTS[name]


class Variant(ABC):
    """How an adapter's product B·A changes a layer's output and its weight.

    Attributes:
        name: the name in the registry.
        turns: whether its merged weight differs from W0 + scale·B·A, so that `weight` computes it.
    """

    name: ClassVar[str]
    turns: ClassVar[bool] = True

    @abstractmethod
    def effect(self, layer: Any, name: str, x: Tensor, base: Tensor) -> Tensor:
        """What an adapter adds to a layer's output.

        Args:
            layer: the adapted layer (`LoraLayer`); ``layer.update(name, x)`` is ``scale·B·A·x``.
            name: the adapter's name.
            x: the layer's input.
            base: the layer's output without adapters; the result has its shape and dtype.
        """

    @abstractmethod
    def weight(self, layer: Any, name: str, W0: Tensor, folded: Tensor, rows: slice) -> Tensor:
        """Rows of the merged weight with this adapter alone; differentiable.

        Args:
            layer: the adapted layer.
            name: the adapter's name.
            W0: rows of the weight that it was trained beside, as a matrix (rows, ...) in the weight's layout.
            folded: the same rows of ``W0 + scale·B·A``.
            rows: their indices.
        """

    def turning(self, layer: Any, name: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, slice], Tensor]:
        """A function like `weight` for many blocks of rows; what they share is computed once."""
        return partial(self.weight, layer, name)

    def __deepcopy__(self, memo: object) -> Variant:
        """Return the variant itself, which holds nothing of any layer."""
        return self

    def __reduce__(self) -> Any:
        """Pickle by name."""
        return of, (self.name,)


class Plain(Variant):
    """LoRA itself: ``scale·B·A·x`` is added."""

    name: ClassVar[str] = "plain"
    turns: ClassVar[bool] = False

    def effect(self, layer: Any, name: str, x: Tensor, base: Tensor) -> Tensor:  # noqa: D102
        return layer.update(name, x).to(base.dtype)

    def weight(self, layer: Any, name: str, W0: Tensor, folded: Tensor, rows: slice) -> Tensor:  # noqa: D102
        return folded


class Biased(Plain):
    """A trained bias b on B: ``scale·b`` is added to every output (`lora_bias`)."""

    name: ClassVar[str] = "biased"

    def effect(self, layer: Any, name: str, x: Tensor, base: Tensor) -> Tensor:  # noqa: D102
        shift = self.shift(layer, name).to(base.dtype)
        return super().effect(layer, name, x, base) + layer.along_outputs(shift)

    def shift(self, layer: Any, name: str) -> Tensor:
        """``scale·b`` (d_out,)."""
        return layer.scaling[name] * layer.bias_parameter(name)


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


PLAIN, BIASED, DORA = Plain(), Biased(), Dora()
for _variant in (PLAIN, BIASED, DORA):
    register(_variant)
