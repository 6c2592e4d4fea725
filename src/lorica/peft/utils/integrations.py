"""What scripts import from `peft.utils.integrations`."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from lorica.layers.quantized import quantizer_of, registry


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """A layer's weight as plain numbers; itself where it is not packed.

    Args:
        module: a layer with a `weight`, adapted or not.
    """
    if quantizer_of(module) is None:
        weight = module._parameters.get("weight")
        return module.weight if weight is None else weight  # type: ignore[return-value]
    return registry.dequantize(module)


def check_deepspeed_zero3_enabled() -> bool:
    """Whether DeepSpeed shards parameters in this process."""
    deepspeed = sys.modules.get("transformers.integrations.deepspeed")
    return deepspeed is not None and bool(deepspeed.is_deepspeed_zero3_enabled())
