"""Names of `peft.functional`, for libraries that put adapters on models without a wrapper."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorica.peft.mapping import inject_adapter_in_model as inject_adapter_in_model
from lorica.peft.tuners.lora.model import LoraModel
from lorica.peft.utils.save_and_load import get_peft_model_state_dict as get_peft_model_state_dict
from lorica.peft.utils.save_and_load import set_peft_model_state_dict as set_peft_model_state_dict


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """As `LoraModel.set_adapter`."""
    LoraModel(model, None).set_adapter(adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """As `LoraModel.delete_adapter`."""
    LoraModel(model, None).delete_adapter(adapter_name)


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """As `LoraModel.set_requires_grad`."""
    LoraModel(model, None).set_requires_grad(adapter_names, requires_grad)
