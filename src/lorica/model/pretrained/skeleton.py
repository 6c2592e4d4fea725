"""A model's structure without its weights: everything on the meta device, from the configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.checkpoint.embedded import resolve_model
from lorica.errors import ConfigError, require

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task type → transformers' class that loads a model with its head."""


def skeleton(model: Any, task_type: str | None = None, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A transformers model on the meta device: shapes and no values, so any size takes no memory.

    Args:
        model: its configuration: transformers' object, its fields with ``"model_type"``, or the folder or Hub
            name that it is loaded from.
        task_type: which head it gets, as in `LoraConfig`; None takes the architecture that the configuration
            names, or no head.
        dtype: of its parameters.

    Raises:
        ConfigError: no configuration can be had from that.
        MissingExtra: transformers is not installed.
    """
    transformers = require("transformers", extra="train")
    config = _configuration(transformers, model)
    names = [] if task_type else getattr(config, "architectures", None) or []
    with torch.device("meta"):
        if names and hasattr(transformers, names[0]):
            result = getattr(transformers, names[0])(config)
        else:
            auto = getattr(transformers, AUTO_CLASSES[task_type or "FEATURE_EXTRACTION"])
            try:
                result = auto.from_config(config)
            except ValueError as error:
                raise ConfigError(f"{type(config).__name__} has no model for {task_type}: {error}") from error
    return result.to(dtype)


def _configuration(transformers: Any, model: Any) -> Any:
    if isinstance(model, transformers.PretrainedConfig):
        return model
    try:
        if isinstance(model, Mapping):
            fields = dict(model)
            return transformers.AutoConfig.for_model(fields.pop("model_type", ""), **fields)
        if isinstance(model, (str, Path)):
            return transformers.AutoConfig.from_pretrained(resolve_model(str(model)), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ConfigError(f"no model configuration can be had from {model!r}: {reason}") from error
    raise ConfigError(
        f"a model is meant by its configuration, its folder or its Hub name, not by a {type(model).__name__}"
    )
