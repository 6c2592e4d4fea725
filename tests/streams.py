"""Checkpoints on disk and adapters for them, small enough to merge in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import lorica
from lorica.adapter import Adapter, Factors

BFLOAT16 = torch.bfloat16


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def write_base(
    folder: Path, *shards: dict[str, Tensor], config: dict[str, Any] | None = None, name: str = "model"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        safetensors.torch.save_file(shards[0], folder / f"{name}.safetensors", metadata={"format": "pt"})
        return folder
    home: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"{name}-{i + 1:05}-of-{len(shards):05}.safetensors"
        safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
        home |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": home}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def factors(d_out: int, d_in: int, r: int = 2, *, size: float = 0.3) -> Factors:
    return Factors(torch.randn(r, d_in) * size, torch.randn(d_out, r) * size, 2.0)


def adapter(updates: dict[str, Factors], extras: dict[str, Tensor] | None = None, **config: Any) -> Adapter:
    return Adapter(
        lorica.LoraConfig(r=2, lora_alpha=4, target_modules=["x"], **config), updates, extras or {}
    )


def delta(update: Factors) -> Tensor:
    return update.scale * update.B @ update.A
