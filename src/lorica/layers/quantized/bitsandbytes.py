"""bitsandbytes' layers: NF4 and FP4 (Dettmers et al., 2023), and LLM.int8() (Dettmers et al., 2022)."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica.errors import LoricaWarning, require
from lorica.layers.quantized.quantizer import Quantizer

REPACKS = "support_avx512bf16_for_cpu"
"""Attribute of a layer that changes its layout when it is first evaluated."""


def _library() -> Any:
    return require("bitsandbytes", extra="quantized")


class FourBit(Quantizer):
    """`Linear4bit`: two numbers per byte and an absolute maximum per block of 64, which may be packed too."""

    casts_input: ClassVar[bool] = True

    def is_packed(self, module: nn.Module) -> bool:  # noqa: D102
        return _quant_state(module) is not None

    def is_unfinished(self, module: nn.Module) -> bool:  # noqa: D102
        return not self.is_packed(module)

    def dequantize(self, module: nn.Module, rows: slice, dtype: torch.dtype) -> Tensor:  # noqa: D102
        functional = _library().functional
        packed, state = _row_major(module)
        height, width = state.shape
        start, stop, _ = rows.indices(height)
        # Blocks run on over the ends of rows; from the top where one reaches over the first row's start.
        top = start if start * width % state.blocksize == 0 else 0
        first, last = top * width, stop * width
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        part = functional.QuantState(
            absmax=absmax[first // state.blocksize : math.ceil(last / state.blocksize)].float(),
            shape=torch.Size((stop - top, width)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=dtype if dtype.itemsize < 8 else torch.float32,
        )
        plain = functional.dequantize_4bit(packed[first // 2 : math.ceil(last / 2)], part)
        return plain[start - top :].to(dtype)

    def requantize(self, module: nn.Module, weight: Tensor) -> dict[str, Any]:  # noqa: D102
        library = _library()
        own = module._parameters["weight"]
        _, state = _row_major(module)
        assert own is not None
        packed, new = library.functional.quantize_4bit(
            weight.contiguous().to(own.device),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=own.dtype,
        )
        new.dtype = state.dtype
        parameter = library.nn.Params4bit(
            packed,
            requires_grad=False,
            quant_state=new,
            blocksize=new.blocksize,
            compress_statistics=new.nested,
            quant_type=new.quant_type,
            quant_storage=own.dtype,
            module=module,
            bnb_quantized=True,
        )
        return {"weight": parameter, "quant_state": new}

    def compute_dtype(self, module: nn.Module, x: Tensor) -> torch.dtype:  # noqa: D102
        return getattr(module, "compute_dtype", None) or x.dtype


class LLMInt8(Quantizer):
    """`Linear8bitLt`: a byte per number and a scale per row; the input is packed as well."""

    casts_input: ClassVar[bool] = True

    def is_packed(self, module: nn.Module) -> bool:  # noqa: D102
        weight = module._parameters["weight"]
        return weight is not None and weight.dtype == torch.int8

    def is_unfinished(self, module: nn.Module) -> bool:  # noqa: D102
        state: Any = module.state
        return not self.is_packed(module) and not state.has_fp16_weights

    def dequantize(self, module: nn.Module, rows: slice, dtype: torch.dtype) -> Tensor:  # noqa: D102
        weight: Any = module._parameters["weight"]
        state: Any = module.state
        scale = weight.SCB if weight.SCB is not None else state.SCB
        # Bit for bit the weight that bitsandbytes multiplies by.
        packed = weight.data.as_subclass(Tensor)[rows]
        return packed.to(dtype, copy=True).mul_(scale[rows].unsqueeze(1).mul(1.0 / 127.0))

    def requantize(self, module: nn.Module, weight: Tensor) -> dict[str, Any]:  # noqa: D102
        library = _library()
        own: Any = module._parameters["weight"]
        packed, scale, _ = library.functional.int8_vectorwise_quant(weight.to(own.device, torch.float16))
        parameter = library.nn.Int8Params(
            packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scale
        )
        state: Any = copy.copy(module.state)
        state.CB = state.SCB = None  # the layer's next forward takes them from the parameter
        return {"weight": parameter, "state": state}


def hold_layout(layers: list[nn.Module]) -> None:
    """Keep 4-bit layers in their layout: on some CPUs an evaluation would repack them, with a loss.

    Where the CPU has AVX512-BF16, `Linear4bit` changes its layout in place the first time that it is called
    in evaluation. That rounds the blocks' maxima to bfloat16, and no gradient passes through it any more.

    Args:
        layers: those that would, by their attribute `REPACKS`; those that are repacked already are restored.
    """
    repacked = 0
    for module in layers:
        setattr(module, REPACKS, False)
        state = _quant_state(module)
        if getattr(state, "packing_format_for_cpu", False):
            weight: Any = module._parameters["weight"]
            weight.data, weight.quant_state = _unpacked_for_cpu(weight.data, state)
            module.quant_state = weight.quant_state
            repacked += 1
    if repacked:
        warnings.warn(
            f"{repacked} 4-bit layers were evaluated on this CPU before the model was adapted; bitsandbytes "
            "repacked them for that and rounded their scales to bfloat16, for good. Adapt a model before it "
            "is evaluated to keep its weights exact",
            LoricaWarning,
            stacklevel=2,
        )


def release_layout(layers: list[nn.Module]) -> None:
    """Undo `hold_layout`."""
    for module in layers:
        setattr(module, REPACKS, True)


def _quant_state(module: nn.Module) -> Any:
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    # A parameter that was exchanged (by FSDP, or a cast) has lost its state; the layer still has it.
    return module.__dict__.get("quant_state") if state is None else state


def _row_major(module: nn.Module) -> tuple[Tensor, Any]:
    """The packed bytes in one row and their quantization state, also after an evaluation repacked them."""
    weight = module._parameters["weight"]
    assert weight is not None
    packed, state = weight.data.as_subclass(Tensor), _quant_state(module)
    if getattr(state, "packing_format_for_cpu", False):
        packed, state = _unpacked_for_cpu(packed, copy.copy(state))
    return packed.contiguous().view(torch.uint8).flatten(), state


def _unpacked_for_cpu(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    packed, state = _library().functional._convert_weight_packed_for_cpu_inverse(packed, state)
    if not state.nested:  # bitsandbytes 0.50 leaves these as the kernel wanted them: transposed, in bfloat16
        state.absmax = state.absmax.t().reshape(-1).float()
    return packed, state
