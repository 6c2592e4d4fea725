"""Quantized layers and models for tests; a test that needs a library that is absent is skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import bits
from torch import Tensor, nn

NEEDED = "needs lorica[quantized]"
BITSANDBYTES = ("nf4", "nf4 plain scales", "fp4", "int8")
TORCHAO = ("ao int8", "ao float8", "ao int4")
KINDS = (*BITSANDBYTES, *TORCHAO)


def quantized(linear: nn.Linear, kind: str) -> nn.Linear:
    """A linear layer whose weight is packed; scales of "nf4" are packed too."""
    if kind in TORCHAO:
        return _by_torchao(linear, kind)
    bnb = pytest.importorskip("bitsandbytes", reason=NEEDED).nn
    shape, bias = (linear.in_features, linear.out_features), linear._parameters["bias"] is not None
    layer: nn.Linear
    if kind == "int8":
        layer = bnb.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
    else:
        options = {"quant_type": kind[:3], "compress_statistics": kind == "nf4"}
        layer = bnb.Linear4bit(*shape, bias=bias, compute_dtype=linear.weight.dtype, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # packs it


def _by_torchao(linear: nn.Linear, kind: str) -> nn.Linear:
    ao: Any = pytest.importorskip("torchao.quantization", reason=NEEDED)
    config: Callable[[], Any] = {
        "ao int8": ao.Int8WeightOnlyConfig,
        "ao float8": ao.Float8WeightOnlyConfig,
        "ao int4": lambda: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # pyright: ignore[reportAttributeAccessIssue]
            granularity=ao.granularity.PerGroup(32),
        ),
    }[kind]
    model = nn.Sequential(linear)
    ao.quantize_(model, config())
    packed = model[0]
    assert isinstance(packed, nn.Linear)
    return packed


def state(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of a model's state, to the bit."""
    return {key: _bits(value) for key, value in model.state_dict().items()}


def _bits(tensor: Tensor) -> bytes:
    parts = getattr(tensor, "tensor_data_names", None)
    return bits(tensor) if parts is None else b"".join(bits(getattr(tensor, name)) for name in parts)
