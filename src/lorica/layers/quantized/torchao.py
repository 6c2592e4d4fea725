"""torchao's weights: tensor subclasses inside a plain `nn.Linear`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.errors import StateError, listing, require
from lorica.layers.quantized.quantizer import Quantizer


class Torchao(Quantizer):
    """Whatever `torchao.quantization.quantize_` makes of a linear layer's weight."""

    def dequantize(self, module: nn.Module, rows: slice, dtype: torch.dtype) -> Tensor:  # noqa: D102
        weight: Any = module._parameters["weight"]
        try:
            part, keep = (weight, rows) if rows == slice(None) else (weight.data[rows], slice(None))
        except (NotImplementedError, RuntimeError):  # a layout that cannot be cut
            part, keep = weight, rows
        # Some round to the dtype they stand for unless they are asked for another; none knows float64.
        wanted = dtype if dtype.itemsize < 8 else torch.float32
        options = {"output_dtype": wanted} if "output_dtype" in _arguments(part.dequantize) else {}
        return part.dequantize(**options)[keep].to(dtype)

    def requantize(self, module: nn.Module, weight: Tensor) -> dict[str, Any]:  # noqa: D102
        own: Any = module._parameters["weight"]
        kind = type(own).__name__
        if kind not in _WRITERS:
            raise StateError(
                f"torchao's {kind} can be read but not written by lorica, which writes {listing(_WRITERS)}; "
                'merge with into="dequantized", or into the original base'
            )
        new = _WRITERS[kind](own, weight.to(device=own.device, dtype=own.dtype))
        return {"weight": Parameter(new, requires_grad=False)}


def _int8(own: Any, weight: Tensor) -> Tensor:
    asymmetric = own.zero_point is not None and bool(own.zero_point.any())
    kinds = require("torchao.quantization.quant_primitives", extra="quantized").MappingType
    return type(own).from_hp(
        weight,
        _granularity(own),
        mapping_type=kinds.ASYMMETRIC if asymmetric else kinds.SYMMETRIC,
        act_quant_kwargs=own.act_quant_kwargs,
        act_quant_scale=own.act_quant_scale,
        act_quant_zero_point=own.act_quant_zero_point,
        act_pre_scale=own.act_pre_scale,
        reduce_range=own.reduce_range,
    )


def _float8(own: Any, weight: Tensor) -> Tensor:
    return type(own).from_hp(
        weight,
        float8_dtype=own.qdata.dtype,
        granularity=_granularity(own),
        mm_config=own.mm_config,
        kernel_preference=own.kernel_preference,
        act_quant_kwargs=own.act_quant_kwargs,
    )


def _intx(own: Any, weight: Tensor) -> Tensor:
    kinds = require("torchao.quantization.quant_primitives", extra="quantized").MappingType
    return type(own).from_hp(
        weight,
        tuple(own.block_size),
        own.target_dtype,
        mapping_type=kinds.ASYMMETRIC if bool(own.zero_point.any()) else kinds.SYMMETRIC,
        activation_quantization=own.activation_quantization,
    )


_WRITERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
}


def _granularity(own: Any) -> Any:
    kinds = require("torchao.quantization.granularity", extra="quantized")
    rows, columns = own.block_size
    if tuple(own.block_size) == tuple(own.shape):
        return kinds.PerTensor()
    if rows == 1:
        return kinds.PerRow() if columns == own.shape[1] else kinds.PerGroup(columns)
    return kinds.PerBlock([rows, columns])


def _arguments(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)
