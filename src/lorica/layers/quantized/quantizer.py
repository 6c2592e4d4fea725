"""The protocol of a library that packs weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Quantizer(ABC):
    """Reads and writes the weight of one kind of quantized linear layer.

    The layer has `in_features` and `out_features`, and computes ``x·Wᵀ + bias`` with the weight that
    `dequantize` returns, up to rounding in its kernels.
    """

    casts_input: ClassVar[bool] = False
    """Whether the layer takes inputs of any floating dtype."""

    def is_packed(self, module: nn.Module) -> bool:
        """Whether the layer's weight is packed now; some libraries pack it when it is moved to its device."""
        return True

    def is_unfinished(self, module: nn.Module) -> bool:
        """Whether the weight is still to be packed."""
        return False

    @abstractmethod
    def dequantize(self, module: nn.Module, rows: slice, dtype: torch.dtype) -> Tensor:
        """The weight, or some of its rows, as plain numbers.

        Args:
            module: the layer; left as it is.
            rows: which rows, a slice of whole steps.
            dtype: to compute in and return.

        Returns:
            (rows, in_features), with memory of its own.
        """

    @abstractmethod
    def requantize(self, module: nn.Module, weight: Tensor) -> dict[str, Any]:
        """Pack a weight as the layer's own: same kind, same block size, same layout.

        Args:
            module: the layer; left as it is.
            weight: (out_features, in_features), float32.

        Returns:
            Attributes of the layer that make it hold the new weight: ``weight``, and what is kept beside it.
        """

    def compute_dtype(self, module: nn.Module, x: Tensor) -> torch.dtype:
        """The dtype in which the layer multiplies an input."""
        return x.dtype
