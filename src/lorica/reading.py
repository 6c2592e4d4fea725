"""Reading files that others wrote: whatever is in them, the reader gets plain values or one kind of error.

A parser takes more than its user can bear: lists nested a thousand deep, numbers of four hundred digits,
halves of characters that no file can hold again. Such values fail far from the file that they came from, so
they are refused here. What reads tensors or YAML imports its library when it is called: the command line
reads JSON without it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.errors import FileError, lines

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS = ".safetensors"

DEPTH = 100
"""Levels of lists and maps inside one another: far more than any file of ours has."""
_MOST = 10_000_000
"""Values in all. A file that says one thing by many names could hold more of them than there is memory."""
_LARGEST = 10**308


def cache_folder() -> Path:
    """The folder of a user's files that can be made again: ``LORICA_CACHE``, else ``~/.cache/lorica``.

    Raises:
        FileNotFoundError: neither that nor the user's own folder is known. It may not be writable, either.
    """
    if given := os.environ.get("LORICA_CACHE"):
        return Path(given)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # noqa: PTH117 - another is to be ignored, the standard says
        return Path(shared) / "lorica"
    try:
        return Path.home() / ".cache" / "lorica"
    except RuntimeError as error:
        raise FileNotFoundError("no folder of this user is known; LORICA_CACHE may name one") from error


def read_json(path: Path, *, halves: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        path: of the file.
        halves: as in `bearable`.

    Raises:
        FileNotFoundError: there is none; who asks knows what was looked for.
        FileError: it is damaged, or holds what is never written to such a file.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    return parse_json(content, str(path), halves=halves)


def parse_json(text: str | bytes, where: str, *, halves: bool = False) -> Any:
    """The value in a JSON text.

    Args:
        text: the JSON.
        where: what to call it in an error.
        halves: as in `bearable`.

    Raises:
        FileError: it is damaged, or holds what is never written to such a file.
    """
    try:
        return bearable(json.loads(text if isinstance(text, str) else text.decode("utf-8")), halves=halves)
    except (ValueError, RecursionError, MemoryError) as error:
        raise FileError(f"{where} cannot be read as JSON: {_reason(error)}; the file is damaged") from error


def read_object(path: Path, *, halves: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        halves: as in `bearable`.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: it holds something else, or is damaged.
    """
    content = read_json(path, halves=halves)
    if not isinstance(content, dict):
        raise FileError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


_MERGED = 10_000
"""Fields of a map of YAML after those that it takes over from others (``<<``)."""


def read_yaml(path: Path, what: str) -> Any:
    """The value in a YAML file.

    Args:
        path: of the file.
        what: its expected content, such as "the recipe".

    Raises:
        FileError: it cannot be read, is not YAML, or is nested or merged beyond what anybody writes by hand.
    """
    import yaml

    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FileError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except ValueError as error:  # no UTF-8; or a path that no file can have
        raise FileError(f"{what} {path} is not YAML: {error}") from error
    try:
        if _deepest(text) > DEPTH:
            raise ValueError(f"its brackets are nested more than {DEPTH} deep")
        return bearable(yaml.load(text, _yaml_loader()))
    except RecursionError:
        reason = "it is nested too deeply"
    except Exception as error:  # a date that is none, or a number of a thousand digits, fails in its own way
        reason = str(error) or type(error).__name__
    raise FileError(f"{what} {path} is not YAML: {reason}")


@functools.cache
def _yaml_loader() -> Any:
    """Of plain values; a map takes over as many fields from others as somebody may have written by hand."""
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            for key, value in node.value:
                merged = key.tag == "tag:yaml.org,2002:merge" and isinstance(value, yaml.SequenceNode)
                if merged and len(value.value) > DEPTH:
                    raise yaml.YAMLError(f"a map takes over {len(value.value)} others")
            super().flatten_mapping(node)
            if len(node.value) > _MERGED:
                raise yaml.YAMLError(f"a map has more than {_MERGED:,} fields")

    return Loader


def _deepest(text: str) -> int:
    """The depth of brackets inside one another, those in quotes and comments too, where few stand."""
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth = max(depth - 1, 0)
    return deepest


def bearable(value: Any, *, halves: bool = False) -> Any:
    """The same plain value, once it is known that it can be walked, computed with and written again.

    Args:
        value: of maps, lists, texts and numbers.
        halves: take halves of characters too, which JSON can write and read, and UTF-8 cannot hold.

    Raises:
        ValueError: it is nested too deeply, has too many parts, a number that is too large, or text with
            half of a character.
    """
    # What lists and maps hold, and how often each is met: one that has many names is walked once.
    level: dict[int, tuple[int, Collection[Any]]] = {0: (1, [value])}
    count = -1
    for _ in range(DEPTH):
        below: dict[int, tuple[int, Collection[Any]]] = {}
        for times, parts in level.values():
            count += times * len(parts)
            for part in parts:
                if isinstance(part, str):
                    part.encode("utf-8", "surrogatepass" if halves else "strict")
                elif isinstance(part, int):
                    if not -_LARGEST < part < _LARGEST:
                        raise ValueError(f"a number of {part.bit_length()} bits is too large")
                elif isinstance(part, Mapping):
                    before, _ = below.get(id(part), (0, ()))
                    below[id(part)] = before + times, [*part, *part.values()]
                elif isinstance(part, (list, tuple, set)):
                    before, _ = below.get(id(part), (0, ()))
                    below[id(part)] = before + times, part
        if count > _MOST:
            raise ValueError(f"it has more than {_MOST:,} parts")
        if not below:
            return value
        level = below
    raise ValueError(f"it is nested more than {DEPTH} deep")


def _reason(error: BaseException) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "a text in it holds half of a character"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _fault(error: Exception) -> str:
    """The fault of a file of tensors, without torch's advice on how to run its content."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return text.splitlines()[0].partition(". Please use")[0] if text else type(error).__name__


def load(path: Path) -> Any:
    """The content of a file, on the CPU; by its suffix safetensors, or else torch's pickled form.

    Raises:
        FileError: it is missing, truncated or damaged.
    """
    import safetensors.torch
    import torch

    try:
        if path.suffix == SAFETENSORS:
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in whatever way their bytes say
        raise FileError(f"{path} is truncated or damaged, or no file of tensors: {_fault(error)}") from error


def named_tensors(data: Any, path: Path) -> dict[str, Tensor]:
    """The content of a file, once it is known to be plain tensors by their names.

    Args:
        data: as `load` gave it.
        path: of the file, for errors.

    Raises:
        FileError: it holds something else, or tensors that are no block of numbers in memory.
    """
    from torch import Tensor

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
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{path} is truncated or damaged, or no file of tensors: {error}") from error


def _oddness(name: str, tensor: Tensor) -> str | None:
    """Why a tensor is no block of numbers; None where it is one."""
    import torch

    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        return "its name holds half of a character"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"is {'nested' if tensor.is_nested else tensor.layout}, not dense; save it with to_dense()"
    if tensor.device.type != "cpu":
        return f"has no values: it is on the device {tensor.device.type}"
    if tensor.is_quantized:
        return "is quantized; save it with dequantize()"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}, not a plain tensor"
    # A few bytes can stand for any number of elements, which the first copy would have to hold.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"is {tuple(tensor.shape)}, repeated from fewer numbers; save it with contiguous()"
    return None


def _shown(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()
