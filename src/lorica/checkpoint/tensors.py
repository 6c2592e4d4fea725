"""Files of tensors by their names: safetensors, and torch's pickled form, of which nothing else is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lorica.errors import FileError

SAFETENSORS = ".safetensors"


def load(path: Path) -> Any:
    """What a file holds, on the CPU; by its suffix safetensors, or else torch's pickled form.

    Raises:
        FileError: it is missing, truncated or damaged.
    """
    try:
        if path.suffix == SAFETENSORS:
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in whatever way their bytes say
        raise FileError(
            f"{path} is truncated or damaged, or no file of tensors: {str(error) or type(error).__name__}"
        ) from error


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors; by the suffix as safetensors, or else in torch's pickled form.

    Args:
        path: of the file.
        tensors: contiguous, on the CPU, no two with one memory.
        metadata: text for the header of safetensors.

    Raises:
        OSError: it cannot be written.
    """
    try:
        if path.suffix == SAFETENSORS:
            safetensors.torch.save_file(dict(tensors), path, metadata=dict(metadata or {}) or None)
        else:
            # A view would bring the whole of what it is a part of.
            whole = {
                name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
                for name, t in tensors.items()
            }
            torch.save(whole, path)
    except (safetensors.SafetensorError, RuntimeError) as error:  # a full disk comes as these, too
        raise OSError(str(error)) from error
