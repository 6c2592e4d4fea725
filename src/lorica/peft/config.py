"""PEFT's configuration classes, with assignable fields, over lorica's; options of loading."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lorica import config as core
from lorica.checkpoint.atomic import replace_files
from lorica.checkpoint.hub import locate
from lorica.checkpoint.peft import CONFIG_FILE, in_order, read_settings
from lorica.config.inits import SETTINGS
from lorica.config.plugins.foreign import FOREIGN, without_foreign
from lorica.errors import ConfigError, LoricaWarning, listing, nearest
from lorica.reading import read_object

__version__ = "0.21.2+lorica"
"""The version of PEFT whose names and files these are; the part after the plus marks files as lorica's."""


_DEFAULTS = {"eva_config": "EVA", "corda_config": "CorDA"}
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
# An adapter is read on the CPU and placed with its base; PEFT's options of spreading it have no effect.
_PLACES = ("torch_device", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index")
_NEED_OTHERS = ("layers_pattern", "target_modules")
"""Fields of which some values are valid only with another field's."""


class Names(list[str]):
    """Names of modules, in the given order; equal to the set of them, which PEFT has."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return set(self) == other if isinstance(other, Set) else super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class PeftType(enum.StrEnum):
    """Methods; lorica.peft has LoRA alone."""

    LORA = "LORA"


class TaskType(enum.StrEnum):
    """Tasks a model is adapted for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class LoraRuntimeConfig:
    """Settings of how an adapter runs; never saved.

    Args:
        ephemeral_gpu_offload: accepted without effect: DoRA's norms are computed from thin products on the
            weights' device.
    """

    ephemeral_gpu_offload: bool = False


class PeftConfig(core.LoraConfig):
    """A configuration of LoRA; see `lorica.LoraConfig` for every field.

    Fields may be assigned later. Between two assignments values may contradict each other; they are checked
    when the configuration is used. Fields that PEFT has and lorica does not are refused by name.

    Raises:
        ConfigError: a value is out of range, or asks for a feature that lorica does not have.

    Warns:
        LoricaWarning: it has settings of a start that is not chosen.
    """

    keeps_idle: ClassVar[bool] = True
    _beside: ClassVar[tuple[str, ...]] = ("auto_mapping", "peft_version", "runtime_config")

    auto_mapping: dict[str, str] | None
    peft_version: str | None
    runtime_config: LoraRuntimeConfig

    def __init__(self, **settings: Any) -> None:
        """Take PEFT's fields by name."""
        method = settings.pop("peft_type", None) or PeftType.LORA
        if str(getattr(method, "value", method)).upper() != "LORA":
            raise ConfigError(f"peft_type is {method!r}; lorica.peft carries LORA only")
        runtime = settings.pop("runtime_config", None) or LoraRuntimeConfig()
        if isinstance(runtime, Mapping):
            runtime = LoraRuntimeConfig(**runtime)
        self.__dict__.update(
            auto_mapping=settings.pop("auto_mapping", None),
            peft_version=settings.pop("peft_version", None) or __version__,
            runtime_config=runtime,
        )
        quiet = settings.pop("quiet", False)
        super().__init__(**settings)
        self._list_names()
        if not quiet:
            self._tell(settings)
            if "transformers" in sys.modules:  # transformers' models or TRL's trainers may get this
                importlib.import_module("lorica.peft.utils.integrations").tell_users()

    def _list_names(self) -> None:
        for field in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, field), list):
                self.__dict__[field] = Names(names)

    def as_found(self, **changes: Any) -> Self:
        """A copy with some fields as they are on a model."""
        found = super().as_found(**changes)
        found._list_names()
        return found

    def _tell(self, given: Mapping[str, Any]) -> None:
        """Warn if the settings of the chosen start are missing, or those of another start are given."""
        for name, kind in SETTINGS.items():
            chosen = self.init_lora_weights == kind.belongs_to
            if chosen and given.get(name) is None and name in _DEFAULTS:
                what = (
                    f"`init_lora_weights` is '{kind.belongs_to}' but `{name}` is not specified. Using "
                    f"default {_DEFAULTS[name]} config."
                )
            elif not chosen and getattr(self, name) is not None:
                what = (
                    f"`{name}` specified but will be ignored when `init_lora_weights` is not "
                    f"'{kind.belongs_to}'."
                )
            else:
                continue
            warnings.warn(what, LoricaWarning, stacklevel=4)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a field.

        Raises:
            ConfigError: the value cannot be used, or there is no such field.
        """
        fields = [item.name for item in dataclasses.fields(self)]
        if name in fields:
            try:
                self.__dict__.update(self.replace(**{name: value}).__dict__)
            except ConfigError:
                if name not in _NEED_OTHERS:
                    type(self)(**{name: value, "quiet": True})  # wrong whatever the others are?
                self.__dict__[name] = value  # the field that it needs may come yet
        elif name in self._beside:
            self.__dict__[name] = value
        elif name == "peft_type":
            if str(getattr(value, "value", value)).upper() != "LORA":
                raise ConfigError(f"peft_type is {value!r}; lorica.peft carries LORA only")
        elif name in FOREIGN:
            without_foreign({name: value}, fields)
        else:
            raise ConfigError(f"{type(self).__name__} has no field {name!r}{nearest(name, fields)}")

    def __getattr__(self, name: str) -> Any:
        """A field of PEFT's that lorica does not have: its value without effect."""
        if name in FOREIGN:
            return FOREIGN[name].inert
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def _register_custom_module(self, mapping: Mapping[type, type]) -> None:
        """Refuse custom wrappers: lorica changes a layer's class in place and wraps none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"_register_custom_module({', '.join(kind.__name__ for kind in mapping)}): lorica.peft puts no "
            "wrapper around a layer, so it takes none. A subclass of nn.Linear is adapted as it is, around "
            "its own forward; for other layers use PEFT itself"
        )

    @property
    def peft_type(self) -> PeftType:
        """The method: always LoRA."""
        return PeftType.LORA

    @property
    def is_prompt_learning(self) -> bool:
        """False: LoRA learns no prompt."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False, likewise."""
        return False

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        beside = {name: self.__dict__[name] for name in self._beside}
        return dataclasses.replace(self, **beside | changes, quiet=True)

    def checked(self) -> Self:
        """Itself, checked.

        Raises:
            ConfigError: its values contradict each other.
        """
        self.replace()
        return self

    def to_dict(self) -> dict[str, Any]:
        """The fields as in `adapter_config.json`."""
        beside = {"auto_mapping": self.auto_mapping, "peft_version": self.peft_version}
        return {**super().to_dict(), **beside}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the fields of an `adapter_config.json`.

        Raises:
            ConfigError: another method's file, or a setting that lorica cannot honour.
        """
        config = super().from_dict(data)
        config.__dict__["auto_mapping"] = data.get("auto_mapping")
        config.__dict__["peft_version"] = data.get("peft_version") or __version__
        return config

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder.

        Args:
            save_directory: created if missing.
            kwargs: ``auto_mapping_dict``, to write beside the fields.

        Raises:
            ConfigError: another argument.
            FileError: the folder cannot be written.
        """
        data = self.to_dict()
        if (mapping := kwargs.pop("auto_mapping_dict", None)) is not None:
            data["auto_mapping"] = mapping
        if kwargs:
            raise ConfigError(f"save_pretrained of a configuration takes no {', '.join(kwargs)}")
        text = json.dumps(in_order(data), indent=2) + "\n"
        writers = {CONFIG_FILE: lambda path: _write(path, text)}
        replace_files(Path(save_directory), writers)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> LoraConfig:
        """Read the configuration of a saved adapter.

        Args:
            pretrained_model_name_or_path: folder, or name on the Hub.
            subfolder: inside it.
            kwargs: ``revision``, ``token``, ``cache_dir`` and other options of downloads.

        Raises:
            FileError: it does not exist.
            ConfigError: it asks for a feature that lorica does not have, or an argument is unknown.
        """
        hub, rest = split_hub({**kwargs, "subfolder": subfolder})
        check_options(rest)
        folder = locate(pretrained_model_name_or_path, **hub)
        return LoraConfig.from_dict(read_settings(folder))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> LoraConfig:
        """A configuration of the class named by ``peft_type``."""
        return LoraConfig(**kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The fields in a file, unchecked, without PEFT's runtime settings."""
        data = read_object(Path(path_json_file), halves=True)
        return {name: value for name, value in data.items() if name != "runtime_config"}


class LoraConfig(PeftConfig):
    """PEFT's LoraConfig: `lorica.LoraConfig` with fields that can be assigned."""


PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType.LORA: LoraConfig}


def as_peft_config(config: core.LoraConfig) -> LoraConfig:
    """A configuration of lorica's own as one with assignable fields.

    Raises:
        ConfigError: it is another library's.
    """
    if isinstance(config, LoraConfig):
        return config.checked()
    if isinstance(config, core.LoraConfig):
        return LoraConfig(**vars(config))
    raise ConfigError(
        f"peft_config must be a LoraConfig of lorica.peft, not of {type(config).__module__}; import it from "
        "lorica.peft"
    )


def get_peft_config(config_dict: Mapping[str, Any]) -> LoraConfig:
    """A configuration from its fields.

    Args:
        config_dict: the fields, ``peft_type`` among them.

    Raises:
        ConfigError: another method, or a setting that lorica cannot honour.
    """
    return LoraConfig.from_dict(config_dict)


def split_hub(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of downloads, and the others."""
    hub = {name: value for name, value in options.items() if name in _HUB and value is not None}
    if options.get("use_auth_token") is not None:
        hub.setdefault("token", options["use_auth_token"])
    return hub, {name: value for name, value in options.items() if name not in (*_HUB, "use_auth_token")}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse unknown options of loading, and warn of those that PEFT ignores too.

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


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
