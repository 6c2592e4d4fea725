"""Safetensors files read piece by piece: a header, and tensors as ranges of bytes.

    u64 length of the header | header: JSON, name → dtype, shape, range | bytes of all tensors, no gaps

The safetensors library returns whole tensors; here a tensor may be larger than the available memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.checkpoint.index import read_index
from lorica.errors import FileError, lines
from lorica.reading import parse_json, read_metadata, read_object

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that arithmetic is done on; tensors of others are bytes to carry over."""
CODES = {dtype: code for code, dtype in DTYPES.items()}

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""Names of a checkpoint's only file; ``NAME.index.json`` lists the shards where there are more."""


class Entry(NamedTuple):
    """A tensor in a file: `offset` is where its bytes start in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """A file of tensors.

    Args:
        path: where it is.
        header: its first bytes, up to the first tensor.
        metadata: text that its writer put into the header.
        entries: name → tensor, in the order of their bytes.
        identity: size, time of the last change and hash of the header, which show whether it has changed.
    """

    path: Path
    header: bytes
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    identity: tuple[int, int, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.identity[0]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights with their configuration.

    Args:
        folder: where it is.
        shards: file name → file, in the order of their names.
        home: tensor → name of the file that holds it.
        index: name and content of the file that lists the shards; None where there is only one file.
        config: content of `config.json`; empty where there is none.
    """

    folder: Path
    shards: Mapping[str, Shard]
    home: Mapping[str, str]
    index: tuple[str, Mapping[str, Any]] | None
    config: Mapping[str, Any]

    def __contains__(self, name: object) -> bool:
        return name in self.home

    def entry(self, name: str) -> Entry:
        """A tensor by its name."""
        return self.shards[self.home[name]].entries[name]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint's files, and none of its tensors.

    Args:
        folder: with `model.safetensors`, or with `model.safetensors.index.json` and the shards it lists.

    Raises:
        FileError: there are no safetensors; a file is missing, truncated or damaged; or the index names a
            shard that is not beside it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(
            f"{folder} is not a folder; give the folder that holds the base's config.json and weights"
        )
    config = _read_config(folder / "config.json")
    for name in WEIGHTS:
        if (folder / name).is_file():
            shard = read_shard(folder / name)
            return Checkpoint(folder, {name: shard}, dict.fromkeys(shard.entries, name), None, config)
    indices = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    if len(indices) != 1:
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf")
        )
        have = (
            f"several: {', '.join(indices)}" if indices else f"only {', '.join(others)}" if others else "none"
        )
        raise FileError(
            f"{folder} should hold {WEIGHTS[0]} or one {WEIGHTS[0]}.index.json, and it has {have}; "
            "load the base with its library and save it again as safetensors"
        )
    index, home = read_index(folder / indices[0])
    shards = {name: read_shard(folder / name) for name in sorted(set(home.values()))}
    lost = [f"{name}: not in {file}" for name, file in home.items() if name not in shards[file].entries]
    if lost:
        raise FileError(f"{folder / indices[0]} lists tensors that are not there:\n{lines(lost)}")
    return Checkpoint(folder, shards, home, (indices[0], index), config)


def open_file(path: Path) -> Checkpoint:
    """Read the header of one file of tensors, and a `config.json` beside it.

    Raises:
        FileError: it is not a safetensors file, or truncated or damaged.
    """
    config = path.with_name("config.json")
    shard = read_shard(path)
    home = dict.fromkeys(shard.entries, path.name)
    content = _read_config(config)
    return Checkpoint(path.parent, {path.name: shard}, home, None, content)


def read_shard(path: Path) -> Shard:
    """Read a file's header.

    Raises:
        FileError: it is missing, truncated or damaged.
    """
    try:
        status = path.stat()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= status.st_size - 8 else b""
        content = parse_json(text, "the header")
        metadata = dict(content.pop("__metadata__", None) or {})
        start = 8 + length
        # An empty tensor begins where the next one begins.
        entries = sorted(
            (_entry(name, item, start) for name, item in content.items()), key=lambda entry: entry[3:]
        )
    except FileNotFoundError:
        raise FileError(f"{path} is not there; the checkpoint is incomplete, download it again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FileError(f"{path} is not a safetensors file, or it is truncated: {error}") from error
    end = start
    for entry in entries:
        if entry.offset != end or entry.nbytes < 0:
            raise FileError(
                f"{path}: the bytes of {entry.name} do not follow those before; the file is damaged"
            )
        if entry.dtype in DTYPES and entry.nbytes != entry.numel * DTYPES[entry.dtype].itemsize:
            raise FileError(f"{path}: {entry.name} has {entry.nbytes} bytes, not what its shape needs")
        end += entry.nbytes
    if end != status.st_size:
        raise FileError(
            f"{path} has {status.st_size:,} bytes, its header speaks of {end:,}; download it again"
        )
    read_metadata(path)  # what the library refuses would be merged into a file that nobody can load
    header = length.to_bytes(8, "little") + text
    identity = (status.st_size, status.st_mtime_ns, hashlib.sha256(header).hexdigest())
    return Shard(path, header, metadata, {entry.name: entry for entry in entries}, identity)


def make_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a file that holds tensors in the given order.

    Args:
        tensors: name, dtype, shape and bytes of each.
        metadata: text to put into the header.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the first tensor starts at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: Tensor) -> memoryview:
    """A view of a contiguous CPU tensor's memory, to be read or written; the tensor must outlive it."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    if not tensor.numel():
        return memoryview(b"")
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr()))


def short(dtype: torch.dtype) -> str:
    """A dtype's name as configurations have it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def read_into(file: FileIO, offset: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor from a file's bytes.

    Raises:
        FileError: the file ends before that.
    """
    file.seek(offset)
    view = as_bytes(tensor)
    while view:
        count = file.readinto(view)
        if not count:
            raise FileError(f"{file.name} became shorter while it was read; start again with the whole file")
        view = view[count:]


def _read_config(path: Path) -> dict[str, Any]:
    """A model's configuration; empty where there is none.

    Raises:
        FileError: it is damaged.
    """
    config = read_object(path) if path.is_file() else {}
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileError(
            f"{path} should list architectures by their names, not {names!r}; the file is damaged"
        )
    labels, kind = config.get("id2label"), config.get("model_type")
    if not isinstance(labels, dict | None) or not isinstance(kind, str | None):
        raise FileError(f"{path} is damaged: its id2label is {labels!r}, its model_type {kind!r}")
    return config


def _entry(name: str, item: Mapping[str, Any], start: int) -> Entry:
    first, last = item["data_offsets"]
    return Entry(
        name, str(item["dtype"]), tuple(map(int, item["shape"])), start + int(first), int(last) - int(first)
    )


def same_bytes(base: Checkpoint, one: str, other: str, *, block: int = 1 << 22) -> bool:
    """Whether two tensors of a checkpoint are equal to the bit."""
    first, second = base.entry(one), base.entry(other)
    if first[1:3] != second[1:3]:
        return False
    paths = [base.folder / base.home[name] for name in (one, other)]
    with paths[0].open("rb") as here, paths[1].open("rb") as there:
        here.seek(first.offset)
        there.seek(second.offset)
        left = first.nbytes
        while left:
            size = min(left, block)
            if here.read(size) != there.read(size):
                return False
            left -= size
    return True
