"""From what `from_pretrained` and `load_adapter` are given to an adapter as a value."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorica.adapter import Adapter
from lorica.checkpoint.hub import locate as locate
from lorica.checkpoint.peft import as_trained, read_settings, read_tensors
from lorica.checkpoint.peft_tensors import from_tensors
from lorica.errors import AdapterError, ConfigError, LoricaWarning, listing, nearest

if TYPE_CHECKING:
    from lorica.peft.config import LoraConfig

_HUB = (
    "subfolder",
    "revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "repo_type",
    "user_agent",
    "etag_timeout",
    "headers",
    "endpoint",
    "library_name",
    "library_version",
    "local_dir",
)
# An adapter is read on the CPU and goes where its base is; PEFT's ways of spreading it have nothing to do.
_PLACES = ("torch_device", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index")
_PREFIX = "base_model.model."


def split_hub(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that say where to find a file, and the others."""
    hub = {name: value for name, value in options.items() if name in _HUB and value is not None}
    if options.get("use_auth_token") is not None:
        hub.setdefault("token", options["use_auth_token"])
    return hub, {name: value for name, value in options.items() if name not in (*_HUB, "use_auth_token")}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of loading that mean nothing, and warn of those that PEFT ignores too.

    Raises:
        ConfigError: naming them.
    """
    idle = [name for name in ("torch_dtype", "dtype") if options.get(name) is not None]
    if idle:
        warnings.warn(
            f"{listing(idle)} is for loading the base; the adapter is float32, or as the base is with "
            "autocast_adapter_dtype=False",
            LoricaWarning,
            stacklevel=3,
        )
    known = (*_PLACES, *_HUB, "ignore_mismatched_sizes", "torch_dtype", "dtype", "use_safetensors")
    unknown = [f"{name!r}{nearest(name, known)}" for name in options if name not in known]
    if unknown:
        raise ConfigError(f"loading an adapter takes no {listing(unknown)}")


def read(
    folder: Path, config: LoraConfig | None = None, key_mapping: Mapping[str, str] | None = None
) -> Adapter:
    """An adapter from a folder, with one of these configurations.

    Args:
        folder: that holds it.
        config: in place of the folder's own.
        key_mapping: regular expression → replacement, for modules that go by another name in this model; the
            first that matches a key is applied.

    Raises:
        FileError: a file is missing or damaged.
        ConfigError: the configuration asks for what lorica does not carry.
        AdapterError: the tensors are not what the configuration says.
    """
    from lorica.peft.config import LoraConfig

    settings = read_settings(folder)
    config = LoraConfig.from_dict(settings) if config is None else config
    tensors = renamed(read_tensors(folder), key_mapping or {})
    try:
        adapter = as_trained(from_tensors(tensors, config), settings)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    adapter.check_finite()
    return adapter


def renamed(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors with each key changed by the first expression that matches it.

    Raises:
        ConfigError: an expression is none.
    """
    try:
        patterns = [(re.compile(pattern), new) for pattern, new in key_mapping.items()]
    except re.error as error:
        raise ConfigError(f"key_mapping holds what is no regular expression: {error}") from error
    result = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        changes = (pattern.subn(new, name) for pattern, new in patterns)
        name = next((changed for changed, times in changes if times), name)
        result[_PREFIX + name if key.startswith(_PREFIX) else name] = tensor
    return result


def as_trainable(adapter: Adapter, trainable: bool) -> Adapter:
    """The adapter with a configuration that says whether it trains."""
    return dataclasses.replace(adapter, config=adapter.config.replace(inference_mode=not trainable))


def conversions(model: nn.Module, given: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """How keys are to be renamed: as given, or as transformers renamed the architecture's modules."""
    return getattr(model, "_checkpoint_conversion_mapping", None) if given is None else given


def fitting(adapter: Adapter, own: Mapping[str, Tensor]) -> Adapter:
    """The adapter with the model's own tensors where those it trained whole have another shape.

    Args:
        adapter: as it was saved.
        own: the model's tensors by name.

    Warns:
        LoricaWarning: naming what is left out.
    """
    wrong = [n for n, tensor in adapter.extras.items() if n in own and own[n].shape != tensor.shape]
    if wrong:
        warnings.warn(
            f"of another shape than in this model, and so left as the model has it: {listing(wrong)}",
            LoricaWarning,
            stacklevel=3,
        )
    kept = {**adapter.extras, **{name: own[name].detach() for name in wrong}}
    return dataclasses.replace(adapter, extras=kept)
