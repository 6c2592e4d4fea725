"""`get_peft_model`: a new adapter on a model, and PEFT's wrapper around it."""

from __future__ import annotations

import warnings

from torch import nn

from lorica.config import LoraConfig
from lorica.errors import ConfigError, LoricaWarning
from lorica.peft.config import as_peft_config
from lorica.peft.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from lorica.peft.utils.other import warn_of_name


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter on a model, in place, and wrap it; the adapter acts at once, and trains.

    Args:
        model: any model.
        peft_config: configuration of the adapter; it is not changed.
        adapter_name: name of the adapter.
        mixed: must be False: lorica.peft has no second method to mix LoRA with.
        autocast_adapter_dtype: keep A and B in float32 beside a base of lower precision; False gives them the
            base's dtype.
        revision: the base's revision, recorded in the configuration.
        low_cpu_mem_usage: leave the adapter on the meta device until its values are loaded.

    Returns:
        The wrapper for the configuration's task.

    Raises:
        TargetError: a pattern matches nothing, or a module that cannot be adapted.
        ConfigError: the model is wrapped already, or `mixed` is set.
    """
    if mixed:
        raise ConfigError("mixed=True mixes methods, and lorica.peft has LoRA alone; leave it out")
    config = as_peft_config(peft_config)
    if revision is not None:
        config = config.replace(revision=revision)
    warn_of_name(adapter_name)
    warn_of_base(model, config)
    wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)
    return wrapper(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def warn_of_base(model: nn.Module, config: LoraConfig) -> None:
    """Warn if an adapter's base differs from the one in its configuration.

    Warns:
        LoricaWarning: naming both.
    """
    given, own = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if given and own and given != own:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{given}' to '{own}'. Please "
            "ensure that the correct base model is loaded when loading this checkpoint.",
            LoricaWarning,
            stacklevel=3,
        )
