"""LoftQ on a base that is quantized already, with PEFT's names and arguments."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import nn

from lorica.model import starts


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Start an adapter on a quantized base by LoftQ; see `lorica.model.starts.replace_lora_weights_loftq`.

    Args:
        peft_model: wrapped or not.
        model_path: the unquantized base's folder or safetensors file; None takes where the model is from.
        adapter_name: of the adapter.
        callback: is called with the model and a layer's name after each layer, and says whether it stays so.
    """
    starts.replace_lora_weights_loftq(peft_model, model_path, adapter_name, callback)
