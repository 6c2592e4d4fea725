"""A quantized linear layer with updates beside its packed weight.

        x ──────── W0, packed ────────┐ what the layer itself returns: its own kernels, its own rounding
        │                             + ──▶ y
        └─ dropout ─ A ─ B ·s ────────┘ in the activation's dtype, from float32 masters

The weight is unpacked for one product at a time, by the layer itself in the forward pass and here in the
backward pass, and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica import functional
from lorica.errors import StateError, TargetError
from lorica.layers.base import LoraLayer
from lorica.layers.kinds import RULES
from lorica.layers.plugins.biased import BIASED
from lorica.layers.plugins.dora import DORA
from lorica.layers.plugins.opaque import LoraOpaque, in_fused
from lorica.layers.quantized import registry
from lorica.layers.quantized.product import packed_linear
from lorica.layers.variants import PLAIN
from lorica.tree import Place

_BLOCK = 1 << 22  # elements of W0 that are unpacked at once to measure its rows: 16 MB of float32


class LoraQuantized(LoraOpaque):
    """A linear layer whose weight is packed in a way that a `Quantizer` reads and writes."""

    packed: ClassVar[bool] = True

    @classmethod
    def is_read(cls, place: Place) -> bool:
        """As `LoraOpaque.is_read`; other code that reads a packed weight cannot multiply by it."""
        return in_fused(place.parent)

    @classmethod
    def has_rows(cls, module: nn.Module) -> bool:
        """Yes: they are unpacked."""
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to ``(..., d_in)``; returns ``(..., d_out)``."""
        names = self.acting()
        if self.adapter_state.rows is not None or len(names) != 1 or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        variant = self.variants[names[0]]
        if variant not in (PLAIN, BIASED, DORA):
            return super().forward(*args, **kwargs)
        y = self._product(args[0], *self.update_of(names[0]))
        if variant is not DORA:
            return y if variant is PLAIN else y + BIASED.shift(self, names[0]).to(y.dtype)
        return DORA.rescaled(y, DORA.ratio(self, names[0]), getattr(self, "bias", None))

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The quantized layer's output; its gradient is that of a product with the unpacked weight."""
        only = len(args) == 1 and not kwargs
        return self._product(args[0]) if only else super().base_forward(*args, **kwargs)

    def _product(
        self, x: Tensor, A: Tensor | None = None, B: Tensor | None = None, scale: float = 0.0, p: float = 0.0
    ) -> Tensor:
        quantizer = registry.quantizer_of(self)
        if quantizer is None:
            raise StateError(
                f"this {self.base_class.__name__} no longer packs its weight as it did when it was adapted"
            )
        return packed_linear(
            x,
            super().base_forward,
            _Unpacker(self, quantizer.compute_dtype(self, x)),
            getattr(self, "bias", None),
            A,
            B,
            scale,
            p,
        )

    @classmethod
    def row_norm(
        cls, module: nn.Module, A: Tensor, B: Tensor, scale: float, weight: Tensor | None = None
    ) -> Tensor:
        """As `LoraLayer.row_norm`, with a block of W0's rows unpacked at a time."""
        if weight is not None:
            return super().row_norm(module, A, B, scale, weight)
        parts = [
            functional.row_norm(registry.dequantize(module, rows, A.dtype), A, B[rows], scale)
            for rows in blocks(module)
        ]
        return torch.cat(parts)

    @property
    def base_shape(self) -> torch.Size:
        """Shape of W0 as plain numbers."""
        return torch.Size((self.out_features, self.in_features))  # type: ignore[arg-type]

    @property
    def precision(self) -> torch.dtype:  # noqa: D102
        return torch.float32

    def base_rows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of W0, unpacked."""
        return registry.dequantize(self, rows, dtype or self.precision)

    def storing(self, leaf: str, value: Tensor) -> dict[str, Any]:
        """As `LoraLayer.storing`, with the weight packed as W0 is."""
        return registry.requantize(self, value) if leaf == self.weight_name else super().storing(leaf, value)

    def stored(self, attributes: Mapping[str, Any]) -> Tensor:
        """As `LoraLayer.stored`; the layer holds the packed weight meanwhile, to unpack it."""
        weight = attributes[self.weight_name]
        if type(weight) is Parameter:
            return weight
        with registry.holding(self, attributes):
            return self.base_rows(slice(None), self.precision)

    def check_mergeable(self) -> None:
        """Refuse nothing: a packed weight takes an update after unpacking."""


class LoraUnfinished(LoraOpaque):
    """A linear layer whose weight will be packed, and is not yet; none is ever adapted."""

    @classmethod
    def check_place(cls, place: Place) -> None:  # noqa: D102
        raise TargetError(
            f"{place.path} is a {type(place.module).__name__} that packs its weight when it is moved to its "
            "device; move the model there first (model.to(...)), then adapt it"
        )


class _Unpacker:
    """Unpacks a layer's weight in the dtype that it computes in."""

    def __init__(self, layer: LoraQuantized, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype

    def __call__(self) -> Tensor:
        return registry.dequantize(self._layer, dtype=self._dtype)


def blocks(module: nn.Module) -> Iterator[slice]:
    """Slices of a quantized layer's rows, small enough to be unpacked together."""
    height, width = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    step = max(_BLOCK // max(width, 1), 1)
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def _quantized(found: type[LoraLayer] | None, module: nn.Module) -> type[LoraLayer] | None:
    if isinstance(module, (nn.Embedding, nn.MultiheadAttention)):
        return found
    if registry.quantizer_of(module) is not None:
        return LoraQuantized
    return LoraUnfinished if found is LoraOpaque and registry.is_unfinished(module) else found


RULES.append(_quantized)
