"""LoftQ for a base that is quantized already: A and B make up for what packing took from its weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from lorica import inits
from lorica.checkpoint.stream.names import Names, fused, fused_rows, match, split, whole
from lorica.checkpoint.stream.shards import DTYPES, WEIGHTS, Checkpoint, open_checkpoint, read_shard
from lorica.config import LoraConfig
from lorica.errors import AdapterError, ConfigError, FileError, StateError, lines, require
from lorica.layers import LoraQuantized, lora_layers
from lorica.state import adapted

Keep = Callable[[nn.Module, str], bool]


@torch.no_grad()
def replace_lora_weights_loftq(
    model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Keep | None = None,
) -> None:
    """Start an adapter on a quantized base so that ``Q + scale·B·A`` comes close to the weight before.

    The weights as they were before packing are read from safetensors, a layer at a time. An adapter that was
    trained is overwritten.

    Args:
        model: adapted, with quantized layers.
        model_path: the unquantized base: folder with its `model.safetensors`, whole or in shards, or that
            file. None takes the folder that the model was loaded from, or what the Hub's cache has under its
            name.
        adapter_name: of the adapter.
        callback: is called with the model and a layer's path after each layer; where it answers False, the
            layer has its old factors again. It may measure, say, whether the outputs came closer.

    Raises:
        AdapterError: no such adapter, or the whole list of layers for which the files hold no weight, or one
            of another shape.
        StateError: the adapter has no quantized layer, or one is merged.
        ConfigError: `model_path` is not given, and the model does not say where it is from.
        FileError: the files are missing or damaged.

    Source: Li et al., 2023, algorithm 1, with the quantized weight as it is.
    """
    root, state = adapted(model)
    config = state.configs[state.known(adapter_name)]
    state.check_unmerged("start an adapter")
    layers = {
        path: layer
        for path, layer in lora_layers(root).items()
        if isinstance(layer, LoraQuantized) and adapter_name in layer.scaling
    }
    if not layers:
        raise StateError(
            f"{adapter_name!r} has no quantized layer, so there is nothing to make up for; on a plain base "
            'take init_lora_weights="loftq"'
        )
    assert isinstance(config, LoraConfig)
    base = _open(root, model_path)
    names = match(list(layers), base.home)
    problems = [
        problem
        for path, layer in layers.items()
        if (problem := _problem(base, names, path, layer, adapter_name))
    ]
    if problems:
        raise AdapterError(
            f"{base.folder} does not hold the weights that this model was quantized from:\n{lines(problems)}"
        )
    for path, layer in layers.items():
        parameters = [*layer.factor_parameters(adapter_name)]
        quantized = layer.base_rows(slice(None), torch.float32)
        weight = _weight(base, names, path, layer).to(quantized)
        new = list(inits.compensate(weight, quantized, len(parameters[0]), layer.scaling[adapter_name]))
        magnitude = layer.magnitude_parameter(adapter_name)
        if magnitude is not None:
            parameters.append(magnitude)
            new.append(layer.row_norm(layer, new[0], new[1], layer.scaling[adapter_name]))
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter, value in zip(parameters, new, strict=True):
            parameter.copy_(value)
        if callback is not None and not callback(model, path):
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _open(root: nn.Module, given: str | os.PathLike[str] | None) -> Checkpoint:
    """The headers of the files that hold the weights before quantization."""
    place = given or ""
    if given is None:
        name: Any = getattr(root, "name_or_path", None)
        if not name:
            raise ConfigError(
                f"this {type(root).__name__} does not say where it was loaded from; give model_path, the "
                "folder that holds the unquantized base's model.safetensors"
            )
        place = name if Path(name).is_dir() else _cached(name)
    path = Path(place)
    if path.name in WEIGHTS and path.is_file():
        path = path.parent
    if path.is_file():
        shard = read_shard(path)
        return Checkpoint(path.parent, {path.name: shard}, dict.fromkeys(shard.entries, path.name), None, {})
    return open_checkpoint(path)


def _cached(name: str) -> str:
    hub = require("huggingface_hub", extra="hub")
    try:
        return hub.snapshot_download(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FileError(
            f"{name!r}, from which the model was loaded, is no folder here and not in the Hub's cache; give "
            "model_path, the folder that holds the unquantized base's model.safetensors"
        ) from error


def _problem(base: Checkpoint, names: Names, path: str, layer: LoraQuantized, adapter: str) -> str | None:
    """The fault of a layer, found before anything is changed."""
    rank, smaller = len(layer.factor_parameters(adapter)[0]), min(layer.base_shape)
    if rank > smaller:
        return f"{path}: its weight has {smaller} directions, and the rank is {rank}"
    stored = _stored(base, names, path, layer)
    if stored is None:
        return f"{path}: no weight of that name"
    entries = [base.entry(name) for name in stored[0]]
    packed = [entry for entry in entries if entry.dtype not in DTYPES]
    if packed:
        return f"{path}: {packed[0].name} is {packed[0].dtype}, and so quantized itself"
    rows = sum(entry.shape[0] for entry in entries) if stored[1] is None else stored[1].stop - stored[1].start
    shapes = [tuple(entry.shape) for entry in entries]
    if any(len(shape) != 2 for shape in shapes) or (rows, shapes[0][1]) != tuple(layer.base_shape):
        return f"{path}: its shape is {tuple(layer.base_shape)}, that of the files {shapes[0]}"
    return None


def _stored(
    base: Checkpoint, names: Names, path: str, layer: LoraQuantized
) -> tuple[list[str], slice | None] | None:
    """The tensors that hold a layer's weight one under the other, or the one of which it is some rows."""
    there = names.to_file(path)
    if name := whole(there, base.home):
        return [name], None
    if members := split(there, base.home):
        return members, None
    if name := fused(there, base.home):
        rows = fused_rows(there, layer.base_shape[0], base.entry(name).shape[0])
        return None if rows is None else ([name], slice(*rows))
    return None


def _weight(base: Checkpoint, names: Names, path: str, layer: LoraQuantized) -> Tensor:
    stored = _stored(base, names, path, layer)
    assert stored is not None
    parts = []
    for name in stored[0]:
        with safetensors.safe_open(base.folder / base.home[name], "pt") as file:
            parts.append(file.get_tensor(name))
    weight = torch.cat(parts)
    return weight if stored[1] is None else weight[stored[1]]
