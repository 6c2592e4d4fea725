"""PEFT's configuration classes over lorica's: the same fields, which can be assigned too."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lorica import config as core
from lorica.checkpoint.atomic import replace_files
from lorica.checkpoint.hub import locate
from lorica.checkpoint.peft import CONFIG_FILE, read_settings
from lorica.config.inits import without_idle
from lorica.errors import ConfigError, nearest
from lorica.peft.places import check_options, split_hub


class PeftType(enum.StrEnum):
    """Methods; lorica carries LoRA, the one that the others are compared with."""

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
    """How an adapter runs, never saved.

    Args:
        ephemeral_gpu_offload: accepted, and needless: DoRA's norms are computed from thin products where the
            weights are.
    """

    ephemeral_gpu_offload: bool = False


class PeftConfig(core.LoraConfig):
    """What to train; see `lorica.LoraConfig` for every field.

    A field may be assigned later, and is checked then as it was at first. What PEFT has and lorica does not
    is refused by name.

    Raises:
        ConfigError: a value is out of range, or asks for what lorica does not carry.
    """

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
            peft_version=settings.pop("peft_version", None),
            runtime_config=runtime,
        )
        super().__init__(**settings)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a field, with the checks it had at first."""
        fields = [item.name for item in dataclasses.fields(self)]
        if name in fields:
            self.__dict__.update(self.replace(**{name: value}).__dict__)
        elif name in self._beside:
            self.__dict__[name] = value
        else:
            raise ConfigError(f"{type(self).__name__} has no field {name!r}{nearest(name, fields)}")

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
        return dataclasses.replace(self, **beside | without_idle(changes))

    def to_dict(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` holds them."""
        # Not peft_version: what PEFT itself wrote, it applied in ways of its own.
        return {**super().to_dict(), "auto_mapping": self.auto_mapping}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the fields of an `adapter_config.json`.

        Raises:
            ConfigError: another method's file, or a setting that lorica cannot honour.
        """
        config = super().from_dict(data)
        config.__dict__["auto_mapping"] = data.get("auto_mapping")
        config.__dict__["peft_version"] = data.get("peft_version")
        return config

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder.

        Args:
            save_directory: made if it is not there.
            kwargs: ``auto_mapping_dict``, to write beside the fields.

        Raises:
            ConfigError: another argument.
            FileError: the folder cannot be written.
        """
        data = {**self.to_dict(), "inference_mode": True}
        if (mapping := kwargs.pop("auto_mapping_dict", None)) is not None:
            data["auto_mapping"] = mapping
        if kwargs:
            raise ConfigError(f"save_pretrained of a configuration takes no {', '.join(kwargs)}")
        text = json.dumps(data, indent=2, sort_keys=True) + "\n"
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
            kwargs: ``revision``, ``token``, ``cache_dir`` and whatever else downloads take.

        Raises:
            FileError: there is none.
            ConfigError: it asks for what lorica does not carry, or an argument is unknown.
        """
        hub, rest = split_hub({**kwargs, "subfolder": subfolder})
        check_options(rest)
        folder = locate(pretrained_model_name_or_path, **hub)
        return LoraConfig.from_dict(read_settings(folder))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> LoraConfig:
        """A configuration of the class that ``peft_type`` names."""
        return LoraConfig(**kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The fields in a file, unchecked."""
        return json.loads(Path(path_json_file).read_text(encoding="utf-8"))


class LoraConfig(PeftConfig):
    """PEFT's LoraConfig: `lorica.LoraConfig` with fields that can be assigned."""


PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType.LORA: LoraConfig}


def as_peft_config(config: core.LoraConfig) -> LoraConfig:
    """A configuration of lorica's own as one that can be changed.

    Raises:
        ConfigError: it is another library's.
    """
    if isinstance(config, LoraConfig):
        return config
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


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
