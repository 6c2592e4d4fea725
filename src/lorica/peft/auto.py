"""A base and its adapter in one call; the adapter's configuration names the base."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lorica.checkpoint.hub import locate
from lorica.config import LoraConfig as CoreConfig
from lorica.errors import ConfigError, require
from lorica.peft.config import PeftConfig, split_hub
from lorica.peft.peft_model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

# Packages that an adapter's file may have imported to build its base.
ALLOWED = ("transformers", "diffusers", "sentence_transformers", "timm")


class AutoPeftModel:
    """Load an adapter together with its base; the adapter's file names the base's class."""

    target_class: ClassVar[str | None] = None
    target_peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self) -> None:
        name = type(self).__name__
        raise ConfigError(f"{name} is not made; call {name}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: CoreConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] = ALLOWED,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base that an adapter names, and put the adapter on it.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or name on the Hub.
            adapter_name: its name on the model.
            is_trainable: whether it trains further.
            config: replaces the saved one.
            revision: of the adapter.
            import_allowlist: packages from which the adapter's file may name the base's class.
            kwargs: for loading the base (``dtype``, ``device_map``, ``token``, ...) and the adapter
                (``subfolder``, ``autocast_adapter_dtype``, ...).

        Returns:
            The model, wrapped.

        Raises:
            ConfigError: the adapter is for another task, or does not name its base.
            FileError: a file is missing or damaged.
        """
        own = (
            "autocast_adapter_dtype",
            "ephemeral_gpu_offload",
            "low_cpu_mem_usage",
            "key_mapping",
            "subfolder",
        )
        for_adapter = {name: kwargs.pop(name) for name in own if name in kwargs}
        account = {
            name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs
        }
        for_adapter |= {**account, "revision": revision}
        folder = locate(pretrained_model_name_or_path, **split_hub(for_adapter)[0])
        saved = PeftConfig.from_pretrained(folder)
        if not saved.base_model_name_or_path:
            raise ConfigError(
                f"{folder} does not name its base (base_model_name_or_path is empty); load the base "
                "yourself and call PeftModel.from_pretrained(base, ...)"
            )
        base_class = cls._base_class(saved, import_allowlist)
        base = base_class.from_pretrained(saved.base_model_name_or_path, revision=saved.revision, **kwargs)
        _make_room(base, folder, kwargs)
        options = {name: value for name, value in for_adapter.items() if name in own[:-1]}
        return cls.target_peft_class.from_pretrained(
            base, folder, adapter_name, is_trainable=is_trainable, config=config, **options
        )

    @classmethod
    def _base_class(cls, saved: Any, allowed: Sequence[str]) -> Any:
        mapping = saved.auto_mapping if isinstance(saved.auto_mapping, Mapping) else {}
        if isinstance(package := mapping.get("parent_library"), str):
            _check_allowed(package, allowed)
        if saved.task_type is not None:
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[saved.task_type]
            if cls.target_peft_class is not expected:
                name = expected.__name__.replace("PeftModel", "AutoPeftModel")
                raise ConfigError(f"the adapter is for {saved.task_type}; use {name}, not {cls.__name__}")
        elif cls.target_class is None:
            return _named_class(mapping)
        return getattr(require("transformers", extra="train"), cls.target_class or "AutoModel")


def _check_allowed(package: str, allowed: Sequence[str]) -> None:
    """Refuse to import a package that a file names, unless the caller trusts it.

    Raises:
        ConfigError: the package is not in the allowlist.
    """
    if not any(package == entry or package.startswith(f"{entry}.") for entry in allowed):
        raise ConfigError(
            f"the adapter's file wants {package!r} imported, which is not in the import allowlist; if you "
            f"trust it, pass import_allowlist=[{package.split('.')[0]!r}]"
        )


def _named_class(mapping: Mapping[str, Any]) -> Any:
    """The class of the base that an adapter's file names.

    Raises:
        ConfigError: the file names no class, or one that cannot be imported.
    """
    package, name = mapping.get("parent_library"), mapping.get("base_model_class")
    if not isinstance(package, str) or not isinstance(name, str) or not package or not name:
        raise ConfigError(
            "the adapter has no task and does not name its base's class; use the AutoPeftModelFor... of its "
            "task"
        )
    try:
        found = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the adapter's file names {package}.{name} as its base's class, and that is not to be had: "
            f"{error}. Install what brings it, or load the base yourself and call "
            "PeftModel.from_pretrained(base, ...)"
        ) from error
    if not hasattr(found, "from_pretrained"):
        raise ConfigError(
            f"the adapter's file names {package}.{name} as its base's class, which cannot load one"
        )
    return found


def _make_room(base: Any, folder: os.PathLike[str], options: dict[str, Any]) -> None:
    """Resize the base's embedding for the tokens that only the adapter's tokenizer has."""
    if not (Path(folder) / "tokenizer_config.json").exists() or not hasattr(base, "get_input_embeddings"):
        return
    transformers = require("transformers", extra="train")
    trust = options.get("trust_remote_code", False)
    tokens = len(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust))
    if tokens > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(tokens)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A causal language model and its adapter."""

    target_class = "AutoModelForCausalLM"
    target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """A sequence-to-sequence model and its adapter."""

    target_class = "AutoModelForSeq2SeqLM"
    target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A classifier of sequences and its adapter."""

    target_class = "AutoModelForSequenceClassification"
    target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A classifier of tokens and its adapter."""

    target_class = "AutoModelForTokenClassification"
    target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """A model that marks answers, and its adapter."""

    target_class = "AutoModelForQuestionAnswering"
    target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """A model that returns hidden states, and its adapter."""

    target_class = "AutoModel"
    target_peft_class = PeftModelForFeatureExtraction
