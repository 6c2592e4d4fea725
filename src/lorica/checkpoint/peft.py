"""PEFT's files, both ways.

    adapter_config.json         the configuration
    adapter_model.safetensors   base_model.model.<module path>.lora_A.weight ...
    README.md                   a model card

Another method's configuration names it under ``method``, where PEFT has its ``peft_type``; what it added to
the model stands in the weights under ``added.``.

What is read is checked against the configuration before anyone sees it; pickled files are read without
running what is in them.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lorica.adapter import TOKEN_ROWS, Adapter, Factors, Kind
from lorica.checkpoint.atomic import replace_files
from lorica.checkpoint.card import model_card
from lorica.config import AdapterConfig, LoraConfig, members, read_config
from lorica.errors import AdapterError, ConfigError, FileError, lines

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
CARD_FILE = "README.md"

_PREFIX = "base_model.model."
_ADDED = "added."
_SIDE = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<leaf>\.weight)?$")
_BIAS = ".lora_B.bias"
_MAGNITUDE = "lora_magnitude_vector"
# In the header of the weights, where other readers do not look: what `Adapter.trained_as` holds.
_TRAINED_AS = "lorica_trained_as"
_UNSUPPORTED = {
    "lora_diag": "KaSA",
    "lora_velora_embed": "VeLoRA",
    "lora_monteclora_sampler": "MonteCLoRA",
}
_UNSUPPORTED_PART = re.compile("|".join(_UNSUPPORTED))


def is_adapter(directory: str | Path) -> bool:
    """Whether a folder holds an adapter: its configuration and its weights."""
    folder = Path(directory)
    return (folder / CONFIG_FILE).is_file() and any(
        (folder / name).is_file() for name in (WEIGHTS_FILE, PICKLED_FILE)
    )


def write(adapter: Adapter, directory: str | Path, *, pickled: bool = False) -> Path:
    """Write an adapter to a folder.

    Args:
        adapter: what to write; tensors keep their dtype.
        directory: made if it is not there. Other files in it are left alone, and so is a model card that
            somebody edited.
        pickled: write `adapter_model.bin`, a pickle of tensors, in place of safetensors, for readers that
            know nothing else.

    Returns:
        The folder.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
        FileError: the folder cannot be written.
    """
    adapter.check_finite()
    folder = Path(directory)
    tensors = {key: t.detach().cpu().contiguous() for key, t in to_tensors(adapter).items()}
    # One memory block may stand under two names only as copies.
    first: dict[int, str] = {}
    for key, tensor in tensors.items():
        if first.setdefault(tensor.untyped_storage().data_ptr(), key) != key:
            tensors[key] = tensor.clone()
    metadata = {"format": "pt"}
    if adapter.trained_as is not None:
        metadata[_TRAINED_AS] = json.dumps(adapter.trained_as.to_dict(), sort_keys=True)
    text = json.dumps({**adapter.config.to_dict(), "inference_mode": True}, indent=2, sort_keys=True) + "\n"
    card = model_card(adapter, folder / CARD_FILE)
    writers = {
        **({} if card is None else {CARD_FILE: lambda path: _write_text(path, card)}),
        PICKLED_FILE if pickled else WEIGHTS_FILE: lambda path: (
            torch.save(tensors, path) if pickled else _write_tensors(path, tensors, metadata)
        ),
        CONFIG_FILE: lambda path: _write_text(path, text),
    }
    if pickled:  # or it would be read in place of the other
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    replace_files(folder, writers)
    return folder


def write_card(adapter: Adapter, directory: str | Path) -> None:
    """Write an adapter's model card alone; one that somebody edited stays.

    Raises:
        FileError: the folder cannot be written.
    """
    folder = Path(directory)
    card = model_card(adapter, folder / CARD_FILE)
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
    folder = Path(directory)
    config, provenance = _read_config(folder)
    tensors = read_tensors(folder)
    try:
        adapter = from_tensors(tensors, config)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    adapter = as_trained(adapter, provenance)
    adapter.check_finite()
    return dataclasses.replace(adapter, trained_as=_read_trained_as(folder))


def to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's tensors by the names they have in PEFT's file."""
    named: dict[str, Tensor] = {}
    wrapped = Counter(_host(path)[0] for path in adapter.factors)
    for path, factors in adapter.factors.items():
        host, inside = _host(path)
        owner = _PREFIX + _wrap(host, wrapped, whole=False) + inside
        leaf = "" if factors.kind == "embedding" else ".weight"
        side = "lora_embedding_" if factors.kind == "embedding" else "lora_"
        named[f"{owner}.{side}A{leaf}"], named[f"{owner}.{side}B{leaf}"] = factors.A, factors.B
        if factors.bias is not None:
            named[f"{owner}{_BIAS}"] = factors.bias
        if factors.magnitude is not None:
            spatial = (1,) * (factors.A.dim() - 2)
            shape = (1, -1, *spatial) if spatial else (-1,)
            named[f"{owner}.{_MAGNITUDE}"] = factors.magnitude.reshape(shape)
    for name, tensor in adapter.extras.items():
        path, _, leaf = name.rpartition(".")
        named[f"{_PREFIX}{_wrap(path, wrapped, whole=True)}.{leaf}" if path else _PREFIX + leaf] = tensor
    named.update({_ADDED + name: tensor for name, tensor in adapter.added.items()})
    return named


def from_tensors(tensors: Mapping[str, Tensor], config: AdapterConfig) -> Adapter:
    """An adapter from tensors by the names they have in PEFT's file.

    Raises:
        AdapterError: with the whole list of keys that are not an adapter's, halves without their other half,
            and wrong ranks.
    """
    halves: dict[tuple[str, Kind], dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    on_B: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    problems: list[str] = []
    lora, others = members(config)
    for key, tensor in tensors.items():
        unsupported = _UNSUPPORTED_PART.search(key)
        if ".original_module." in key:
            pass  # with bias="all" PEFT writes those of the frozen original too, and the trained ones twice
        elif unsupported is not None:
            feature = _UNSUPPORTED[unsupported[0]]
            problems.append(f"{key}: belongs to {feature}, which lorica does not support here")
        elif key.startswith(_ADDED) and others:
            added[key.removeprefix(_ADDED)] = tensor
        elif not key.startswith(_PREFIX):
            problems.append(f"{key}: does not start with {_PREFIX!r}")
        elif key.endswith(f".{_MAGNITUDE}"):
            magnitudes[_path(key.removesuffix(f".{_MAGNITUDE}"))] = tensor.flatten()
        elif key.endswith(_BIAS):
            on_B[_path(key.removesuffix(_BIAS))] = tensor
        elif (hit := _SIDE.match(key)) is None:
            extras[_path(key).replace(".modules_to_save.", ".")] = tensor
        elif bool(hit["embedding"]) == bool(hit["leaf"]):
            problems.append(f"{key}: expected {'no ' if hit['embedding'] else ''}'.weight' at its end")
        else:
            path = _path(hit["path"])
            kind: Kind = "embedding" if hit["embedding"] else "conv" if tensor.dim() > 2 else "linear"
            halves.setdefault((path, kind), {})[hit["side"]] = tensor
    factors: dict[str, Factors] = {}
    for (path, kind), sides in halves.items():
        if missing := {"A", "B"} - sides.keys():
            problems.append(f"{path}: lora_{missing.pop()} is missing")
        elif lora is None:
            problems.append(f"{path}: has a low-rank update, which the configuration says nothing of")
        elif names := _parameter_names(_host(path)[0], lora):
            meant = {(lora.rank(name), lora.scale(name)) for name in names}
            r, scale = min(meant)
            if len(meant) > 1:
                problems.append(
                    f"{path}: rank_pattern and alpha_pattern differ for {names}, and the file does not say "
                    "which of them is which; give them one rank and alpha"
                )
            elif problem := _stack_mismatch(sides["A"], sides["B"], r):
                problems.append(f"{path}: {problem}")
            else:
                factors[path] = Factors(sides["A"], sides["B"], scale, "parameter")
        elif problem := _mismatch(sides["A"], sides["B"], lora.rank(path), kind):
            problems.append(f"{path}: {problem}")
        else:
            magnitude = magnitudes.pop(path, None)
            bias = on_B.pop(path, None)
            factors[path] = Factors(sides["A"], sides["B"], lora.scale(path), kind, magnitude, bias)
            problems += _disagreements(path, _MAGNITUDE, magnitude, "use_dora", lora.use_dora)
            problems += _disagreements(path, "lora_B.bias", bias, "lora_bias", lora.lora_bias)
    if lora is None or lora.trainable_token_indices is None:
        rows = (name for name in extras if name.endswith(f".{TOKEN_ROWS}"))
        problems += [f"{name}: trained rows, though trainable_token_indices is not set" for name in rows]
    problems += [f"{path}: {_MAGNITUDE} without lora_A and lora_B" for path in magnitudes]
    problems += [f"{path}: lora_B.bias without lora_A and lora_B" for path in on_B]
    if lora is not None and not halves:
        problems.append("there is no lora_A or lora_B in it")
    if problems:
        raise AdapterError(f"the weights are not those of an adapter that lorica can use:\n{lines(problems)}")
    return Adapter(config, factors, extras, added)


def _disagreements(path: str, part: str, tensor: Tensor | None, field: str, wanted: bool) -> list[str]:
    """What is wrong where a module has a part that the configuration does not ask for, or lacks one."""
    if wanted and tensor is None:
        return [f"{path}: {part} is missing, though {field} is set"]
    if tensor is not None and not wanted:
        return [f"{path}: has a {part}, though {field} is not set"]
    return []


def _host(path: str) -> tuple[str, str]:
    """A module's path without the ``.base_layer`` that tell its parameters apart, and those."""
    host = re.sub(r"(\.base_layer)+$", "", path)
    return host, path[len(host) :]


def _parameter_names(host: str, config: LoraConfig) -> list[str]:
    """The names that `target_parameters` may mean at a module; none where it is a target itself."""
    modules = config.target_modules
    if isinstance(modules, str):
        is_target = re.fullmatch(modules, host) is not None
    else:
        is_target = any(f".{host}".endswith(f".{name}") for name in modules or [])
    parts = [] if is_target else [name.rpartition(".") for name in config.target_parameters or []]
    return [f"{host}.{leaf}" for owner, _, leaf in parts if not owner or f".{host}".endswith(f".{owner}")]


def _path(key: str) -> str:
    """A module's path in the base, from PEFT's key for it."""
    host, inside = _host(key.removeprefix(_PREFIX))
    return re.sub(r"(\.base_layer)+\.", ".", host) + inside


def _mismatch(A: Tensor, B: Tensor, r: int, kind: Kind) -> str | None:
    if A.dim() < 2 or B.dim() != A.dim():
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} are not the two halves of an update"
    if A.shape[0] != r:
        return f"its rank is {A.shape[0]}, but the configuration says r={r}"
    inner = B.shape[1]
    if inner != r and not (kind == "conv" and inner and r % inner == 0):
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} do not share one rank"
    return None


def _stack_mismatch(A: Tensor, B: Tensor, r: int) -> str | None:
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] % r:
        return (
            f"A {tuple(A.shape)} and B {tuple(B.shape)} are not the two halves of updates of rank {r}, one "
            "for each expert"
        )
    return None


def _wrap(path: str, wrapped: Mapping[str, int], *, whole: bool) -> str:
    """Insert the `base_layer` that PEFT's wrappers put between an adapted module and what it holds."""
    parts = path.split(".")
    result = []
    for i, part in enumerate(parts):
        result.append(part)
        if whole or i + 1 < len(parts):
            result += ["base_layer"] * wrapped.get(".".join(parts[: i + 1]), 0)
    return ".".join(result)


def _read_trained_as(folder: Path) -> LoraConfig | None:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        return None
    with safetensors.safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_TRAINED_AS)
    try:
        return None if text is None else LoraConfig.from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(f"the header of {path} is damaged: {_TRAINED_AS} in it is wrong: {error}") from error


def as_trained(adapter: Adapter, provenance: Mapping[str, Any]) -> Adapter:
    """The adapter with the effect it had where it was trained.

    Args:
        adapter: as its file has it.
        provenance: the settings beside it, which say who wrote it.

    PEFT (up to 0.21.2 at least) applies the update of an nn.MultiheadAttention's output projection twice, in
    training and after. Files that it wrote therefore mean twice what they say there.
    """
    attention = [
        path
        for path in adapter.factors
        if path.endswith(".out_proj") and path.removesuffix(".out_proj") in adapter.factors
    ]
    if "peft_version" not in provenance or not attention:
        return adapter
    doubled = {
        path: dataclasses.replace(f, B=2 * f.B) for path, f in adapter.factors.items() if path in attention
    }
    return dataclasses.replace(adapter, factors={**adapter.factors, **doubled})


def _read_config(folder: Path) -> tuple[AdapterConfig, Mapping[str, Any]]:
    data = read_settings(folder)
    try:
        return read_config(data), data
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: {error}") from error


def read_settings(directory: str | Path) -> Mapping[str, Any]:
    """The fields in an adapter's configuration file, as they stand there.

    Raises:
        FileError: there is none, or it is damaged.
    """
    folder = Path(directory)
    path = folder / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        have = "it is not there" if not folder.exists() else "it has none"
        raise FileError(f"{folder} is not an adapter: it should hold {CONFIG_FILE}, and {have}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise FileError(f"{path} cannot be read as JSON: {error}; the file is damaged") from error
    if not isinstance(data, dict):
        raise FileError(f"{path} should hold a JSON object, not a {type(data).__name__}")
    return data


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """The tensors in an adapter's folder by the names they have there, on the CPU.

    Raises:
        FileError: there are none, or the file is damaged.
    """
    folder = Path(directory)
    path, pickled = folder / WEIGHTS_FILE, folder / PICKLED_FILE
    try:
        if path.is_file():
            return safetensors.torch.load_file(path)
        if pickled.is_file():
            return _named_tensors(torch.load(pickled, map_location="cpu", weights_only=True))
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
    ) as error:
        raise FileError(f"{path if path.is_file() else pickled} is truncated or damaged: {error}") from error
    raise FileError(f"{folder} has {CONFIG_FILE} but no {WEIGHTS_FILE}; the adapter was not saved to its end")


def _named_tensors(data: object) -> dict[str, Tensor]:
    if isinstance(data, dict) and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in data.items()):
        return dict(data)
    raise ValueError(f"it should hold tensors by name, not a {type(data).__name__} of something else")


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata=metadata)
    except safetensors.SafetensorError as error:  # a full disk comes as this, too
        raise OSError(str(error)) from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
