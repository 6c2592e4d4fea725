"""PEFT's files, both ways.

    adapter_config.json         the configuration
    adapter_model.safetensors   base_model.model.<module path>.lora_A.weight ...
    README.md                   a model card

The configuration of another method than LoRA names it under ``method``, where PEFT has its ``peft_type``; the
weights hold the parts it added to the model under ``added.``.

Tensors are checked against the configuration before they are returned; pickled files are read without running
any code in them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from lorica.adapter import Adapter
from lorica.checkpoint.atomic import replace_files, save
from lorica.checkpoint.card import model_card
from lorica.checkpoint.foreign import recognized
from lorica.checkpoint.peft_tensors import from_tensors, spelled
from lorica.config import AdapterConfig, LoraConfig, read_config
from lorica.errors import AdapterError, ConfigError, FileError
from lorica.reading import SAFETENSORS, load, named_tensors, parse_json, read_metadata, read_object

T = TypeVar("T")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
CARD_FILE = "README.md"

# In the header of the weights, which other readers skip: `Adapter.trained_as` and `classes`.
_TRAINED_AS = "lorica_trained_as"
_CLASSES = "lorica_classes"
# Likewise: the scale of each parameter's update, as their keys do not say which parameter is which.
_SCALES = "lorica_scales"
# Likewise: how keys are read in which a module is called as a part of PEFT's own is; see `Spelled.marks`.
_MARKS = "lorica_marks"

# Settings that PEFT writes and lorica does not. Before 0.18 it did not write its version.
_OF_PEFT = ("peft_version", "megatron_core")

# An nn.MultiheadAttention's output projection, inside what PEFT put around the attention.
_OUTPUT = ".base_layer.out_proj.lora_B.weight"


def as_path(given: Any) -> Path:
    """The path that an argument names.

    Raises:
        FileError: it is no text and no path, or one that no file can have.
    """
    try:
        path = Path(given)
        os.fsencode(path)
        path.exists()
    except (TypeError, ValueError, OSError) as error:
        reason = f": {error.strerror}" if isinstance(error, OSError) else ""
        raise FileError(f"a path is due, as a text or a Path, not {given!r:.80}{reason}") from error
    return path


def is_adapter(directory: str | Path) -> bool:
    """Whether a folder holds an adapter: its configuration and its weights."""
    folder = as_path(directory)
    return (folder / CONFIG_FILE).is_file() and _has_weights(folder)


def write(adapter: Adapter, directory: str | Path, *, pickled: bool = False) -> Path:
    """Write an adapter to a folder.

    Args:
        adapter: what to write; tensors keep their dtype.
        directory: created if missing. Other files in it stay, and so does an edited model card; weights in
            the other form are removed.
        pickled: write `adapter_model.bin`, a pickle of tensors, instead of safetensors, for readers that know
            no other form.

    Returns:
        The folder.

    Raises:
        AdapterError: a tensor holds NaN or infinity, or the factors are as an older PEFT computed with them.
        FileError: the folder cannot be written.
    """
    adapter.check_finite()
    if adapter.stacks is not None:
        raise AdapterError(
            "these factors of stacked experts are as an older PEFT computed with them; lorica.load the "
            "adapter on its base, and lorica.save it from there"
        )
    folder = as_path(directory)
    named, marks = spelled(adapter)
    if marks and pickled:
        raise AdapterError(
            f"{next(iter(marks))}: a module is called as a part of PEFT's own is, which a pickled file "
            "cannot tell; write safetensors"
        )
    tensors = {key: t.detach().cpu().contiguous() for key, t in named.items()}
    # One memory block may stand under two names only as copies.
    first: dict[int, str] = {}
    for key, tensor in tensors.items():
        if first.setdefault(tensor.untyped_storage().data_ptr(), key) != key:
            tensors[key] = tensor.clone()
    metadata = {"format": "pt"}
    if adapter.classes is not None:
        metadata[_CLASSES] = json.dumps(adapter.classes)
    if adapter.trained_as is not None:
        metadata[_TRAINED_AS] = json.dumps(in_order(adapter.trained_as.to_dict()))
    scales = {path: f.scale for path, f in adapter.factors.items() if f.kind == "parameter"}
    if scales:
        metadata[_SCALES] = json.dumps(scales, sort_keys=True)
    if marks:
        metadata[_MARKS] = json.dumps(marks, sort_keys=True)
    settings = {**adapter.config.to_dict(), "inference_mode": True}
    # Of which PEFT a configuration is says how its file's tensors count, and these are written anew.
    settings.pop("peft_version", None)
    text = json.dumps(in_order(settings), indent=2) + "\n"
    card = model_card(adapter, folder / CARD_FILE)
    weights, stale = (PICKLED_FILE, WEIGHTS_FILE) if pickled else (WEIGHTS_FILE, PICKLED_FILE)
    writers = {
        **({} if card is None else {CARD_FILE: lambda path: _write_text(path, card)}),
        weights: lambda path: _write_tensors(path, tensors, metadata),
        CONFIG_FILE: lambda path: _write_text(path, text),
    }
    replace_files(folder, writers, gone=[stale])
    return folder


def in_order(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's fields by their names; patterns stay in their order, for the first match wins."""
    return dict(sorted(settings.items()))


def write_card(adapter: Adapter, directory: str | Path, about: str = "") -> None:
    """Write an adapter's model card alone; an edited one stays.

    Args:
        adapter: the adapter that the card describes.
        directory: folder of the adapter.
        about: sections in Markdown on what the adapter does and how it was trained.

    Raises:
        FileError: the folder cannot be written.
    """
    folder = as_path(directory)
    card = model_card(adapter, folder / CARD_FILE, about)
    if card is not None:
        replace_files(folder, {CARD_FILE: lambda path: _write_text(path, card)})


def read(directory: str | Path) -> Adapter:
    """Read an adapter from a folder.

    Args:
        directory: folder with `adapter_config.json` and `adapter_model.safetensors` (or an
            `adapter_model.bin`, which is read without unpickling anything but tensors).

    Returns:
        The adapter, on the CPU.

    Raises:
        FileError: a file is missing, truncated or damaged.
        ConfigError: the configuration is another method's, or asks for what lorica does not support.
        AdapterError: the tensors are not what the configuration says.
    """
    folder = as_path(directory)
    config, provenance = _read_config(folder)
    tensors = read_tensors(folder)
    try:
        adapter = from_tensors(
            as_trained(tensors, provenance), config, read_scales(folder), read_marks(folder)
        )
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    adapter.check_finite()
    return dataclasses.replace(
        adapter,
        trained_as=read_trained_as(folder),
        classes=read_classes(folder),
        stacks=stacks_of(adapter, provenance),
    )


def read_scales(directory: str | Path) -> dict[str, float]:
    """Path → scale of each parameter's update, from the header of lorica's own files; empty for other files.

    Raises:
        FileError: the header is damaged.
    """

    def scales(found: Any) -> dict[str, float]:
        if not isinstance(found, dict) or not all(isinstance(s, (int, float)) for s in found.values()):
            raise ValueError("should be numbers by path")
        return {name: float(scale) for name, scale in found.items()}

    return _noted(directory, _SCALES, scales) or {}


def read_marks(directory: str | Path) -> dict[str, str]:
    """`Spelled.marks` of an adapter in a folder; empty for files of other libraries.

    Raises:
        FileError: the header is damaged.
    """
    path = Path(directory) / WEIGHTS_FILE
    text = read_metadata(path).get(_MARKS) if path.is_file() else None
    if text is None:
        return {}
    found = parse_json(text, f"{_MARKS} in the header of {path}")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise FileError(f"the header of {path} is damaged: {_MARKS} in it should be names by key")
    return found


def read_trained_as(directory: str | Path) -> LoraConfig | None:
    """`Adapter.trained_as` of an adapter in a folder.

    Raises:
        FileError: the header is damaged.
    """

    def config(found: Any) -> LoraConfig:
        try:
            return LoraConfig.from_dict(found)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"is wrong: {error}") from error

    return _noted(directory, _TRAINED_AS, config, halves=True)


def read_classes(directory: str | Path) -> tuple[str, ...] | None:
    """`Adapter.classes` of an adapter in a folder.

    Raises:
        FileError: the header is damaged.
    """

    def names(found: Any) -> tuple[str, ...]:
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ValueError("is no list of names")
        return tuple(found)

    return _noted(directory, _CLASSES, names)


def _noted(directory: str | Path, key: str, read: Callable[[Any], T], *, halves: bool = False) -> T | None:
    """Lorica's notes in the header of an adapter's weights; None where there are none."""
    path = Path(directory) / WEIGHTS_FILE
    text = read_metadata(path).get(key) if path.is_file() else None
    if text is None:
        return None
    found = parse_json(text, f"{key} in the header of {path}", halves=halves)
    try:
        return read(found)
    except ValueError as error:
        raise FileError(f"the header of {path} is damaged: {key} in it {error}") from error


def as_trained(tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> dict[str, Tensor]:
    """An adapter's tensors, changed so that they do here what they did where they were trained.

    Args:
        tensors: the file's, by their names in it.
        provenance: the settings beside it, which name the library that wrote it.

    PEFT (up to 0.21.2 at least) applies the update of an nn.MultiheadAttention's output projection twice, in
    training and after. Files that it wrote therefore mean twice what they say there.
    """
    if not _by_peft(provenance):
        return dict(tensors)
    outputs = {
        key
        for key in tensors
        if key.endswith(_OUTPUT) and f"{key.removesuffix(_OUTPUT)}.lora_A.weight" in tensors
    }
    return {key: 2 * tensor if key in outputs else tensor for key, tensor in tensors.items()}


def stacks_of(adapter: Adapter, provenance: Mapping[str, Any]) -> Literal["plain", "turned"] | None:
    """The way in which the PEFT that wrote a file computed with stacked experts; see `Adapter.stacks`.

    Before 0.19 it took no notice of how a module stores them; 0.19.0 did, the wrong way round.

    Args:
        adapter: the file's content.
        provenance: the settings beside it, which name the library that wrote it.
    """
    if not _by_peft(provenance) or all(f.kind != "parameter" for f in adapter.factors.values()):
        return None
    version = str(provenance.get("peft_version") or "")
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)  # before 0.18 it did not write its version
    numbers = [int(part or 0) for part in found.groups()] if found else [0, 17, 0]
    return "plain" if numbers < [0, 19, 0] else "turned" if numbers == [0, 19, 0] else None


def _by_peft(provenance: Mapping[str, Any]) -> bool:
    """Whether PEFT itself wrote a file."""
    by_lorica = str(provenance.get("peft_version", "")).endswith("+lorica")
    return not by_lorica and any(name in provenance for name in _OF_PEFT)


def _read_config(folder: Path) -> tuple[AdapterConfig, Mapping[str, Any]]:
    data = read_settings(folder)
    try:
        return (read_config(data) if "method" in data else LoraConfig.from_dict(data)), data
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: {error}") from error


def read_settings(directory: str | Path) -> Mapping[str, Any]:
    """The fields in an adapter's configuration file, unchanged.

    Raises:
        FileError: there is none, or it is damaged.
    """
    folder = Path(directory)
    if (folder.is_file() or not _has_weights(folder)) and (other := recognized(folder)):
        raise FileError(other)
    try:
        return read_object(folder / CONFIG_FILE, halves=True)
    except FileNotFoundError:
        have = "it is not there" if not folder.exists() else "it has none"
        raise FileError(f"{folder} is not an adapter: it should hold {CONFIG_FILE}, and {have}") from None


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, PICKLED_FILE))


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """The tensors in an adapter's folder by their names in the file, on the CPU.

    Raises:
        FileError: there are none, or the file is damaged.
    """
    folder = Path(directory)
    path, pickled = folder / WEIGHTS_FILE, folder / PICKLED_FILE
    path = path if path.is_file() else pickled
    if not path.is_file():
        raise FileError(
            f"{folder} has {CONFIG_FILE} but no {WEIGHTS_FILE}; the adapter was not saved to its end"
        )
    return named_tensors(load(path), path)


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save(path, tensors, metadata)
    if path.suffix == SAFETENSORS:
        _sort_header(path)


def _sort_header(path: Path) -> None:
    """Sort a file's metadata: safetensors writes them in a different order each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
