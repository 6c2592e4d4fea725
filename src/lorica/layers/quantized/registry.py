"""The registry of quantizers: which one reads and writes which kind of layer.

A packed weight is a parameter of bytes with some numbers beside it, wherever its library keeps them. A
`Quantizer` is all that lorica needs of a library: it unpacks the weight into plain numbers, and packs plain
numbers with the same settings. `register` adds others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import StateError
from lorica.layers.quantized.bitsandbytes import FourBit, LLMInt8
from lorica.layers.quantized.quantizer import Quantizer
from lorica.layers.quantized.torchao import Torchao

# By name, since importing these libraries to ask would cost seconds, and they may not be installed.
_QUANTIZERS: dict[type | str, Quantizer] = {
    "bitsandbytes.nn.modules.Linear4bit": FourBit(),
    "bitsandbytes.nn.modules.Linear8bitLt": LLMInt8(),
    "torchao.utils.TorchAOBaseTensor": Torchao(),
}


def register(kind: type | str, quantizer: Quantizer) -> None:
    """Tell lorica how a kind of layer packs its weight; such layers then train and merge as others do.

    Args:
        kind: class of the layer, or of its weight; or that class's full name, such as
            ``"hqq.core.quantize.HQQLinear"``, which need not be imported. Includes subclasses.
        quantizer: reads and writes the weight. Replaces an earlier registration of the class.
    """
    _QUANTIZERS[kind] = quantizer
    _registered.cache_clear()


def quantizer_of(module: nn.Module) -> Quantizer | None:
    """The quantizer of a layer's packed weight; None if it is not packed, or in no known way."""
    quantizer = _known(module)
    return quantizer if quantizer is not None and quantizer.is_packed(module) else None


def is_unfinished(module: nn.Module) -> bool:
    """Whether a layer's kind packs its weight, and this layer's is not packed yet."""
    quantizer = _known(module)
    return quantizer is not None and quantizer.is_unfinished(module)


def dequantize(module: nn.Module, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
    """A quantized layer's weight as plain numbers.

    Args:
        module: quantized layer, adapted or not.
        rows: which rows.
        dtype: to compute in and return.

    Returns:
        (rows, in_features), with memory of its own; W0 alone where the layer is adapted.

    Raises:
        StateError: the layer's weight is not packed in a way that lorica knows.
    """
    with torch.no_grad():
        return _require(module).dequantize(module, rows, dtype)


def requantize(module: nn.Module, weight: Tensor) -> dict[str, Any]:
    """Pack a weight as a quantized layer's own; the layer stays as it is.

    Args:
        module: quantized layer.
        weight: (out_features, in_features), in any floating dtype.

    Returns:
        The layer's attributes that store the weight; `holding` sets them for the length of a block.

    Raises:
        StateError: the layer's weight is packed in no way that lorica knows, or in one it can only read.
    """
    with torch.no_grad():
        return _require(module).requantize(module, weight.detach().float())


@contextlib.contextmanager
def holding(module: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Let a layer hold the result of `requantize` for the length of a block."""
    before = {name: set_attribute(module, name, value) for name, value in state.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            set_attribute(module, name, value)


def set_attribute(module: nn.Module, name: str, value: Any) -> Any:
    """Replace a module's parameter, buffer or plain attribute; returns the old one."""
    stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
    store = next(store for store in stores if name in store)
    before, store[name] = store[name], value
    return before


def numel(parameter: Tensor) -> int:
    """Count of numbers in a parameter; bitsandbytes packs two of four bits into a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else torch.Size(shape).numel()


def _require(module: nn.Module) -> Quantizer:
    quantizer = quantizer_of(module)
    if quantizer is None:
        raise StateError(
            f"{type(module).__name__} holds no weight that is packed in a way lorica knows; "
            "lorica.layers.quantized.register teaches it others"
        )
    return quantizer


def _known(module: nn.Module) -> Quantizer | None:
    return _registered(type(module), type(module._parameters.get("weight")))


@functools.cache
def _registered(*kinds: type) -> Quantizer | None:
    for cls in (cls for kind in kinds for cls in kind.__mro__):
        for key in (cls, f"{cls.__module__}.{cls.__qualname__}"):
            if key in _QUANTIZERS:
                return _QUANTIZERS[key]
    return None
