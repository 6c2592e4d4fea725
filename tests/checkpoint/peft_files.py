"""An adapter, and what its files can be made to hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from tiny import Toy, adapted
from torch import Tensor

import lorica

CONFIG = lorica.LoraConfig(r=2, lora_alpha=3, target_modules=["up", "embed"], modules_to_save=["head"])


def trained() -> lorica.Adapter:
    return lorica.extract(adapted(Toy(), CONFIG))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = tensors_of(folder)
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
