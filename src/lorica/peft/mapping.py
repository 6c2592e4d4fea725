"""PEFT's methods by name (LoRA alone), and adapters without a wrapper."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

import lorica
from lorica.config import LoraConfig as CoreConfig
from lorica.errors import ConfigError, TargetError
from lorica.peft.config import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
from lorica.peft.config import PeftType, as_peft_config
from lorica.peft.config import get_peft_config as get_peft_config
from lorica.peft.mapping_func import get_peft_model as get_peft_model
from lorica.peft.tuners.lora.model import LoraModel
from lorica.peft.utils.integrations import to_meta
from lorica.peft.utils.other import IdleWarning, named_whole, put_again, without_idle
from lorica.pieces import resolve
from lorica.tree import as_uncompiled

PEFT_TYPE_TO_TUNER_MAPPING = {PeftType.LORA: LoraModel}

_MARKS = (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")


def inject_adapter_in_model(
    peft_config: CoreConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Put a new adapter on a model, in place, without a wrapper: `lorica.adapt` by PEFT's name.

    Args:
        peft_config: configuration of the adapter.
        model: any model.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: leave the adapter on the meta device until its values are loaded.
        state_dict: adapt only the modules in its keys; its values are not used.

    Returns:
        The same model.

    Raises:
        TargetError: a pattern matches nothing, or a module that cannot be adapted.
        ConfigError: `state_dict` names no module.
    """
    config = named_whole(model, without_idle(model, as_peft_config(peft_config)))
    if state_dict is not None:
        config = _as_named(model, config, state_dict)
    put_again(model, adapter_name, lambda name: lorica.adapt(model, config, name))
    if low_cpu_mem_usage:
        to_meta(model, adapter_name)
    return model


def _as_named(model: nn.Module, config: CoreConfig, state_dict: Mapping[str, Any]) -> CoreConfig:
    """The configuration with the modules in a state's keys as its targets.

    Raises:
        ConfigError: the state names none; or `target_parameters` is set, which a state's keys do not name.

    Warns:
        IdleWarning: the configuration targets other modules.
    """
    if config.target_parameters:
        raise ConfigError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`: "
            "the keys do not tell which parameter they are of. Leave state_dict out"
        )
    named = {key[: key.index(mark)] for key in state_dict for mark in _MARKS if mark in key}
    if not named:
        raise ConfigError("state_dict has no key with .lora_A or .lora_B in it: it names no module")
    paths = {as_uncompiled(name).removeprefix("base_model.model.") for name in named}
    try:
        meant = {target.path for target in resolve(model, config).targets}
    except TargetError:
        meant = set[str]()
    for what, more in (("PEFT config", meant - paths), ("state_dict", paths - meant)):
        if more:
            warnings.warn(
                "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config "
                "and the provided state_dict. This is not necessarily an issue and can be ignored if this "
                f"was the intent. The {what} contained these additional target modules: {sorted(more)}. ",
                IdleWarning,
                stacklevel=3,
            )
    return config.replace(
        target_modules=sorted(paths), exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )
