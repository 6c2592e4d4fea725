"""The options that say where an adapter's files are, as `from_pretrained` and its kin take them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lorica.errors import ConfigError, LoricaWarning, listing, nearest

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
