"""What scripts import from `peft.utils.other`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.errors import ConfigError, require
from lorica.layers import SavedModule as ModulesToSaveWrapper
from lorica.layers import TrainedTokens as TrainableTokensWrapper
from lorica.model import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from lorica.peft.utils.constants import CONFIG_NAME as CONFIG_NAME
from lorica.peft.utils.constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from lorica.peft.utils.constants import WEIGHTS_NAME as WEIGHTS_NAME

AuxiliaryTrainingWrapper = (ModulesToSaveWrapper, TrainableTokensWrapper)
"""What is asked of isinstance: a module trained whole, or one some of whose rows are."""


def infer_device() -> str:
    """The accelerator that is there, or "cpu"."""
    for name in ("cuda", "mps", "xpu", "npu", "mlu"):
        backend: Any = getattr(torch, name, None)
        if backend is not None and hasattr(backend, "is_available") and backend.is_available():
            return name
    return "cpu"


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight, transposed where it is stored (in, out)."""
    if not fan_in_fan_out:
        return weight
    return Parameter(weight.T) if isinstance(weight, Parameter) else weight.T


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what does not train a lower precision, and what trains float32.

    Args:
        model: wrapped or not.
        dtype: of what does not train, such as torch.bfloat16.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The model's own quantization settings, if they are of this method; else None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if getattr(model, "quantization_method", None) == method else None


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Which modules FSDP1 shards by themselves: the blocks, and leaves that train.

    Args:
        model: wrapped or not. The blocks' classes are those that the base names, or that
            ``FSDP_TRANSFORMER_CLS_TO_WRAP`` does.

    Raises:
        ConfigError: a class that the model does not have.
        MissingExtra: accelerate is not installed.
    """
    from torch.distributed.fsdp.wrap import (
        _or_policy,
        lambda_auto_wrap_policy,
        transformer_auto_wrap_policy,
    )

    dataclasses: Any = require("accelerate.utils.dataclasses", extra="train")
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = sorted(_blocks(model)) if named is None else named.split(",")
    classes = set()
    for name in filter(None, names):
        found = dataclasses.get_module_class_from_name(model, name)
        if found is None:
            raise ConfigError(f"the model has no module of the class {name!r} to be sharded by itself")
        classes.add(found)
    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf)
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return functools.partial(_or_policy, policies=[leaves, blocks])


def _blocks(model: nn.Module) -> set[str]:
    """Names of the classes that the model says must not be split."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not any(module.children()) and weight is not None and weight.requires_grad


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The holder of a module, the module, and its name there."""
    above, _, name = key.rpartition(".")
    return model.get_submodule(above), model.get_submodule(key), name
