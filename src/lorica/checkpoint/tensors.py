"""Reading files of tensors by their names: safetensors, and torch's pickled form, nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lorica.errors import FileError, lines

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


def named_tensors(data: Any, path: Path) -> dict[str, Tensor]:
    """What a file held, once it is known to be plain tensors by their names.

    Args:
        data: as `load` gave it.
        path: of the file, for errors.

    Raises:
        FileError: it holds something else, or tensors that are no block of numbers in memory.
    """
    if not isinstance(data, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in data.items()
    ):
        raise FileError(f"{path} should hold tensors by name, not a {type(data).__name__} of something else")
    if odd := [f"{_shown(name)}: {why}" for name, t in data.items() if (why := _oddness(name, t))]:
        raise FileError(f"{path} should hold plain tensors, and has:\n{lines(odd)}")
    return dict(data)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a file of safetensors.

    Raises:
        FileError: it is damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{path} is truncated or damaged, or no file of tensors: {error}") from error


def _oddness(name: str, tensor: Tensor) -> str | None:
    """Why a tensor is no block of numbers; None where it is one."""
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        return "its name holds half of a character"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"is {'nested' if tensor.is_nested else tensor.layout}, not dense; save it with to_dense()"
    if tensor.device.type != "cpu":
        return f"has no values: it is on the device {tensor.device.type}"
    if tensor.is_quantized:
        return "is quantized; save it with dequantize()"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}, not a plain tensor"
    # A few bytes can stand for any number of elements, which the first copy would have to hold.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"is {tuple(tensor.shape)}, repeated from fewer numbers; save it with contiguous()"
    return None


def _shown(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()
