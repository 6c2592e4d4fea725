"""Recognise adapters in other libraries' formats, so that a sound file is not called damaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import safetensors

_MLX = "an adapter of MLX's; mlx_lm.fuse folds it into its base, as a model that any library reads"
_KOHYA = "an adapter of kohya's sd-scripts, for a diffusion pipeline: diffusers' load_lora_weights reads it"
_DIFFUSERS = "an adapter of diffusers', for a pipeline of several models: its load_lora_weights reads it"
_TORCHTUNE = "an adapter of torchtune's, in its own names; its checkpointer for Hugging Face writes PEFT's"
_READ = "lorica reads PEFT's folders (adapter_config.json and adapter_model.safetensors)"


def recognized(path: Path) -> str | None:
    """The format of a file or folder in another library's form, and how to use it; None if not known.

    Args:
        path: file or folder given as an adapter. Only the header of a file is read.
    """
    kind = _file(path) if path.is_file() else _folder(path)
    return None if kind is None else f"{path} is {kind}. {_READ}"


def _file(path: Path) -> str | None:
    if path.name in ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"):
        return f"a file of an adapter; give its folder, {path.parent}"
    return _by_keys(path) or "a file, where an adapter's folder is due"


def _folder(path: Path) -> str | None:
    if (path / "adapters.safetensors").is_file():
        return _MLX
    if (path / "pytorch_lora_weights.safetensors").is_file():
        return _DIFFUSERS
    if next(path.glob("adapter_[0-9]*.pt"), None) is not None:
        return _TORCHTUNE
    return None


def _by_keys(path: Path) -> str | None:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return by_names(list(file.keys()))
    except Exception:  # not safetensors, and not a folder
        return None


def by_names(names: Iterable[str]) -> str | None:
    """The format of a file by the names of its tensors; None if not known."""
    names = list(names)
    ends = {name.rpartition(".")[2] for name in names}
    if any(".lora_down." in name or ".lora_up." in name for name in names):
        return _KOHYA
    if {"lora_a", "lora_b"} & ends:
        return _MLX
    if any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in names):
        return _TORCHTUNE
    if any(name.startswith(("unet.", "text_encoder.", "transformer.")) for name in names):
        return _DIFFUSERS
    return None
