"""The ways in which an adapter forms a layer's output and weight: plain, DoRA, or with a bias on B.

    plain    y + s·B·A·x                         W0 + s·B·A
    DoRA     m/‖W‖ · (W·x),  W = W0 + s·B·A      m/‖W‖ · W        (by rows)
    biased   y + s·(B·A·x + b)                   W0 + s·B·A, and s·b on the layer's bias

A variant is a class with two methods, `Variant.effect` and `Variant.weight`, registered under its value of
`LoraConfig.variant`; DoRA and the bias (`lorica.layers.plugins`) have fields of their own there, as in PEFT.
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
    """The change of a layer's output and weight by an adapter's product B·A.

    Attributes:
        name: the name in the registry.
        turns: whether its merged weight differs from W0 + scale·B·A, so that `weight` computes it.
    """

    name: ClassVar[str]
    turns: ClassVar[bool] = True

    @abstractmethod
    def effect(self, layer: Any, name: str, x: Tensor, base: Tensor) -> Tensor:
        """The addition of an adapter to a layer's output.

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

    def linear(self, layer: Any, name: str, x: Tensor) -> Tensor | None:
        """A linear layer's output in one step; None where `effect` is to be added to the base's.

        Args:
            layer: the adapted layer (`LoraLinear`).
            name: the adapter's name.
            x: the layer's input (..., d_in).
        """
        return None

    def shift(self, layer: Any, name: str) -> Tensor | None:
        """The addition of the adapter to the layer's bias (d_out,), if there is one."""
        return None

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


PLAIN = register(Plain())
