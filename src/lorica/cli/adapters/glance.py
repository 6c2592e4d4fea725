"""The facts in a plain LoRA adapter's files, read without torch, whose import takes longest.

The header of the weights names tensors, shapes and places; a norm takes products of r × r. Whatever is
no plain adapter of matrices in safetensors is left to a whole read, which says what is wrong with it, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.config import LoraConfig, read_config
from lorica.errors import LoricaError

_PREFIX = "base_model.model."
_SIDE = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
_UNUSUAL = re.compile(r"lora_(?![AB]\.weight$)|base_layer|original_module|_orig_mod|token_adapter")
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_CLASSES = "lorica_classes"
# Features whose tensors mean more than their header says.
_FEATURES = ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "ensure_weight_tying")


def glance(folder: Path) -> tuple[LoraConfig, dict[str, Any]] | None:
    """An adapter's configuration, and its layers, whole tensors, parameters and bytes as `info` shows them.

    Returns:
        None where a whole read is needed.
    """
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config = read_config(settings)
        if not isinstance(config, LoraConfig) or any(getattr(config, name) for name in _FEATURES):
            return None
        return _looked_at(folder / "adapter_model.safetensors", config)
    except (OSError, ValueError, TypeError, LookupError, ImportError, RecursionError, LoricaError):
        return None


def _looked_at(file: Path, config: LoraConfig) -> tuple[LoraConfig, dict[str, Any]] | None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    told = header.pop("__metadata__", {})
    if set(told) - {"format", _CLASSES} or not _is_names(told.get(_CLASSES, "[]")):
        return None
    data = memoryview(content)[8 + length :]
    halves: dict[str, dict[str, Any]] = {}
    whole: dict[str, list[int]] = {}
    numbers = 0
    for key, entry in header.items():
        start, stop = entry["data_offsets"]
        count = 1
        for size in entry["shape"]:
            count *= size
        if _UNUSUAL.search(key) or not key.startswith(_PREFIX):
            return None
        if count * _WIDTHS[entry["dtype"]] != stop - start or not 0 <= start <= stop <= len(data):
            return None
        numbers += count
        hit = _SIDE.fullmatch(key)
        if hit is None:
            if not _finite(data[start:stop], entry):
                return None
            whole[key.removeprefix(_PREFIX).replace(".modules_to_save.", ".")] = entry["shape"]
        else:
            halves.setdefault(hit["path"], {})[hit["side"]] = _matrix(data[start:stop], entry)
    if not halves:
        return None
    layers = {path: _layer(path, sides["A"], sides["B"], config) for path, sides in halves.items()}
    found = {"layers": layers, "whole": whole, "parameters": numbers}
    held = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    return config, {**found, "bytes": held}


def _is_names(text: str) -> bool:
    names = json.loads(text)
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _layer(path: str, A: Any, B: Any, config: LoraConfig) -> dict[str, Any]:
    """One layer's row.

    Raises:
        ValueError: a whole read has something to say of it.
    """
    r, scale = config.rank(path), config.scale(path)
    if A.shape[0] != r or B.shape[1] != r:
        raise ValueError(path)
    squared = float(((B.T @ B) * (A @ A.T)).sum())
    if not squared < float("inf"):
        raise ValueError(path)
    norm = abs(scale) * max(squared, 0.0) ** 0.5
    return {"r": r, "scale": scale, "shape": [B.shape[0], A.shape[1]], "norm": norm}


def _numbers(data: memoryview, entry: Mapping[str, Any]) -> Any:
    import numpy as np

    if entry["dtype"] == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[entry["dtype"]])


def _matrix(data: memoryview, entry: Mapping[str, Any]) -> Any:
    """A matrix in float64.

    Raises:
        ValueError: it is none.
    """
    rows, columns = entry["shape"]
    return _numbers(data, entry).astype("<f8").reshape(rows, columns)


def _finite(data: memoryview, entry: Mapping[str, Any]) -> bool:
    import numpy as np

    return bool(np.isfinite(_numbers(data, entry)).all())
