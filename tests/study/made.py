"""Adapters and bases with something planted in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lorica import Adapter, Factors, LoraConfig


def columns(d: int, k: int, seed: int) -> Tensor:
    """(d, k) random orthonormal columns in float64."""
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=draw, dtype=torch.float64)).Q


def planted(U: Tensor, S: Sequence[float], V: Tensor, scale: float = 1.0) -> Factors:
    """An update with these singular vectors and values, in factors that look nothing like them."""
    draw = torch.Generator().manual_seed(9)
    mix = torch.randn(len(S), len(S), generator=draw, dtype=torch.float64)
    mix += 3 * torch.eye(len(S), dtype=torch.float64)
    B = U * torch.tensor(S, dtype=torch.float64) / scale @ torch.linalg.inv(mix)
    return Factors(mix @ V.mT, B, scale)


def gaussian(d_out: int, d_in: int, r: int, seed: int = 0, scale: float = 0.5) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, d_in, generator=draw), torch.randn(d_out, r, generator=draw), scale)


def adapter(layers: Mapping[str, Factors], **settings: Any) -> Adapter:
    r = max(f.r for f in layers.values())
    pattern = {path: f.r for path, f in layers.items() if f.r != r}
    names = sorted({path.rpartition(".")[2] for path in layers})
    return Adapter(LoraConfig(r=r, rank_pattern=pattern, target_modules=names, **settings), layers)


def dense(f: Factors) -> Tensor:
    """The update itself, formed: the reference of what is computed from factors."""
    return f.scale * f.B.double().flatten(1) @ f.A.double().flatten(1)


def write_base(folder: Path, weights: Mapping[str, Tensor], **config: object) -> Path:
    """A checkpoint with these weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
