"""Adapters made of drawn numbers, one layer of each kind, and what their updates come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from oracle import update
from torch import Tensor

from lorica import Adapter, Factors, LoraConfig

# Path → dimensions of A and of B beside the rank, kind, and groups.
LAYERS: dict[str, tuple[tuple[int, ...], int, Any, int]] = {
    "a.linear": ((7,), 5, "linear", 1),
    "b.linear": ((7,), 5, "linear", 1),
    "table": ((11,), 6, "embedding", 1),
    "conv": ((3, 2, 2), 4, "conv", 1),
    "grouped": ((4, 3), 6, "conv", 2),
}


def made(
    r: int = 4,
    alpha: float = 6,
    seed: int = 0,
    *,
    paths: Sequence[str] = tuple(LAYERS),
    dtype: torch.dtype = torch.float32,
    extras: dict[str, Tensor] | None = None,
    **settings: Any,
) -> Adapter:
    """An adapter with an update of rank `r` at each path."""
    draw = torch.Generator().manual_seed(seed)
    targets: dict[str, Any] = {"target_modules": list(paths)}
    config = LoraConfig(r=r, lora_alpha=alpha, **(targets | settings))
    factors = {}
    for path in paths:
        inputs, d_out, kind, groups = LAYERS[path]
        rank = config.rank(path)
        A = torch.randn(rank, *inputs, generator=draw).to(dtype)
        B = torch.randn(d_out, rank // groups, *[1] * (len(inputs) - 1), generator=draw).to(dtype)
        magnitude = torch.rand(d_out, generator=draw) if config.use_dora else None
        factors[path] = Factors(A, B, config.scale(path), kind, magnitude)
    return Adapter(config, factors, extras or {})


def updates(adapter: Adapter) -> dict[str, Tensor]:
    """The updates in float64, by path."""
    return {path: update(factors) for path, factors in adapter.factors.items()}


def weighted(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of the updates, by path."""
    total: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, each in updates(adapter).items():
            total[path] = total.get(path, torch.zeros_like(each)) + weight * each
    return total


def agree(adapter: Adapter, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """The adapter's updates are the expected ones; and its settings say so, as a file's reader needs."""
    assert adapter.factors.keys() == expected.keys()
    for path, factors in adapter.factors.items():
        found, size = update(factors), float(expected[path].norm())
        assert found.shape == expected[path].shape
        assert float((found - expected[path]).norm()) <= tolerance * max(size, 1.0), path
        assert (adapter.lora.rank(path), adapter.lora.scale(path)) == (factors.r, factors.scale), path
