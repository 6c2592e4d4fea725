"""Quantizing as bitsandbytes does, and the start that makes up for it."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from lorica import inits
from lorica.config import LoftQConfig

SHAPES = [(64, 96), (33, 50), (5, 7), (1, 1), (128, 64)]


def naive_nf4(weight: Tensor) -> Tensor:
    """Block by block, each element to the nearest of the sixteen values."""
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, below, torch.zeros(1)]).sort().values
    values = values / values.abs().max()
    flat, result = weight.flatten().double(), []
    for block in flat.split(64):
        largest = block.abs().max()
        nearest = (block[:, None] / largest - values).abs().argmin(1)
        result.append(values[nearest] * largest)
    return torch.cat(result).view_as(weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_by_definition(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    torch.testing.assert_close(inits.quantized(weight, 4).double(), naive_nf4(weight), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore")
def test_the_same_bits_as_bitsandbytes(shape: tuple[int, int]) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    functional = importlib.import_module("bitsandbytes.functional")
    weight = torch.randn(shape)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    # Its own way back goes wrong on a CPU where rows are no whole number of blocks (0.50.2).
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: weight.numel()]
    scales = state.absmax.repeat_interleave(64)[: weight.numel()]
    assert torch.equal(inits.quantized(weight, 4), (state.code[codes.int()] * scales).view_as(weight))
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    expected = functional.int8_vectorwise_dequant(codes, scales)
    torch.testing.assert_close(inits.quantized(weight, 8), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay(bits: int) -> None:
    weight = torch.randn(4, 64)
    weight[1] = 0
    result = inits.quantized(weight, bits)
    assert torch.isfinite(result).all()
    assert not result[1].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_one_round_by_definition(bits: int, scale: float) -> None:
    weight = torch.randn(40, 30)
    A, B, base = inits.loftq(weight, 6, scale, LoftQConfig(loftq_bits=bits))
    assert torch.equal(base, inits.quantized(weight, bits))
    U, S, Vh = torch.linalg.svd((weight - base).double())
    expected = U[:, :6] @ torch.diag(S[:6]) @ Vh[:6]
    torch.testing.assert_close((scale * B @ A).double(), expected, rtol=0, atol=1e-5)


def test_more_rounds_come_closer() -> None:
    weight = torch.randn(64, 64)

    def lost(iterations: int) -> float:
        A, B, base = inits.loftq(weight, 16, 2.0, LoftQConfig(loftq_iter=iterations))
        return float((weight - base - 2.0 * B @ A).norm())

    plain = float((weight - inits.quantized(weight, 4)).norm())
    assert plain > lost(1) > lost(5)
