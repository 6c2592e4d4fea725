"""Scales that float16 has no room for: the update and its gradients are those of float64, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica import LoraConfig, functional

IDS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(0))
TARGETS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["lin"]},
    "embedding": {"target_modules": ["embed"]},
    "convolution": {"target_modules": ["conv"]},
    "attention": {"target_modules": ["mha"]},
    "encoder": {"target_modules": ["linear1", "linear2"]},
    "parameter": {"target_parameters": ["lin.weight"]},
    "experts": {"target_parameters": ["experts"]},
}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.experts[0].mT + x @ self.experts[1].mT) / 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.lin = nn.Linear(16, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
        self.enc = nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True)
        self.moe = Experts()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.lin(self.embed(ids))
        x = x + self.conv(x.mT).mT
        x = x + self.moe(x)
        return self.enc(x + self.mha(x, x, x)[0])


def adapted(dtype: torch.dtype, scale: float, names: tuple[str, ...] = ("default",), **fields: Any) -> Any:
    model = Net().to(dtype)
    for name in names:
        lorica.adapt(model, LoraConfig(r=2, lora_alpha=2 * scale, **fields), name)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=random)
                parameter.copy_(drawn * 0.2 / scale**0.5).requires_grad_(True)
    return model


def close(came: Tensor, expected: Tensor) -> None:
    assert came.isfinite().all()
    assert (came.double() - expected).abs().max() < 2e-2 * expected.abs().max()


@pytest.mark.parametrize("scale", [1e5, 1e9, 1e-6, 1e-9])
@pytest.mark.parametrize("form", TARGETS)
def test_outputs_and_gradients(form: str, scale: float) -> None:
    found = []
    for dtype in (torch.float16, torch.float64):
        model = adapted(dtype, scale, **TARGETS[form])
        y = model(IDS)
        (y.double() * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        merged = (lorica.merge(model), model(IDS))[1]
        found.append((y, merged, grads))
    (y, merged, grads), (expected, _, right) = found
    assert (expected - Net().double()(IDS)).abs().max() > 0.1
    close(y, expected)
    close(merged, expected)
    assert grads.keys() == right.keys()
    for name, grad in grads.items():
        close(grad, right[name])


@pytest.mark.parametrize("scale", [1e5, 1e-9])
@pytest.mark.parametrize("form", ["linear", "embedding", "convolution"])
@torch.no_grad()
def test_by_row_and_together(form: str, scale: float) -> None:
    low, right = (adapted(d, scale, ("one", "two"), **TARGETS[form]) for d in (torch.float16, torch.float64))
    for choose in (lambda m: lorica.active(m, ["one", "two"]), lambda m: lorica.mixed(m, ["one", "two"] * 2)):
        with choose(low), choose(right):
            close(low(IDS), right(IDS))


def test_others_are_left_alone() -> None:
    A, B = torch.ones(1, 2), torch.ones(2, 1)
    for scale in (0.0, 1.0, -3.0, 6e4, 2e-5):
        assert functional.evened(A, B, scale) == (A, B, scale)
    A, B, scale = functional.evened(A, B, -1e6)
    assert (A[0, 0], B[0, 0], scale) == (1e3, -1e3, 1.0)
