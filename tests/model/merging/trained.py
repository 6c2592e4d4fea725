"""Models with trained adapters on them."""

from __future__ import annotations

from tiny import Toy, adapted, bits
from torch import nn

import lorica

CONFIG = lorica.LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down", "embed"])
WHOLE = CONFIG.replace(modules_to_save=["head"], bias="all")


def model_with(*configs: lorica.LoraConfig, model: nn.Module | None = None) -> nn.Module:
    """A `Toy` with trained adapters a, b, ...; the last one acts."""
    model = Toy() if model is None else model
    for seed, (name, config) in enumerate(zip("abc", configs, strict=False)):
        adapted(model, config, name, seed)
    return model


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}
