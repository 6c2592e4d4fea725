"""Parameter groups for AdamW: weight decay where it belongs, and LoRA+'s faster B."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import Parameter

from lorica.errors import ConfigError
from lorica.layers import LoraLayer, tied_factors


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Group a model's trainable parameters for an optimizer.

    B starts at zero and A does not, and with one rate for both, the wider the layer, the less B learns; LoRA+
    gives B a rate ``loraplus_lr_ratio`` times that of A. Everything else (A, a new head, biases) trains at
    ``lr``.

    Args:
        model: the model, adapted or not. Frozen parameters are left out.
        lr: learning rate.
        weight_decay: decay of weight matrices. Biases and the weights of norms have none.
        loraplus_lr_ratio: learning rate of B, and of its bias, over `lr`. None or 1 gives two groups, as
            without LoRA+.

    Returns:
        Groups for ``torch.optim.AdamW`` or any other optimizer; empty ones are left out.

    Raises:
        ConfigError: a ratio is asked for and the model has no B, or nothing trains at all.

    Source:
        LoRA+: Efficient Low Rank Adaptation of Large Models (Hayou, Ghosh, Yu, 2024), section 4.
    """
    ratio = loraplus_lr_ratio or 1.0
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigError("no parameter of the model trains; adapt it first, or unfreeze what should train")
    undecayed = _undecayed(model)
    up = _up(model) if ratio != 1.0 else set()
    fast = {name for name, parameter in named.items() if parameter in up}
    if ratio != 1.0 and not fast:
        raise ConfigError("loraplus_lr_ratio needs a LoRA adapter, and this model has no lora_B that trains")

    def group(names: list[str], lr: float, decay: float) -> dict[str, Any]:
        return {"params": [named[name] for name in names], "lr": lr, "weight_decay": decay}

    slow = [name for name in named if name not in fast]
    groups = [
        group([name for name in slow if name not in undecayed], lr, weight_decay),
        group([name for name in slow if name in undecayed], lr, 0.0),
        group([name for name in named if name in fast - undecayed], lr * ratio, weight_decay),
        group([name for name in named if name in fast & undecayed], lr * ratio, 0.0),
    ]
    return [entry for entry in groups if entry["params"]]


def _up(model: nn.Module) -> set[Parameter]:
    """Every adapter's B, and its bias; where a head's are an embedding's, the embedding's B."""
    found: set[Parameter | None] = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.scaling:
                if tied_factors(module, name) is None:
                    for _, _, holder in module.holders(name):
                        found |= {holder.factor_parameters(name)[1], holder.bias_parameter(name)}
    return {parameter for parameter in found if parameter is not None}


def _undecayed(model: nn.Module) -> set[str]:
    """Biases, by that word anywhere in a name (`in_proj_bias`, `bias_hh_l0`), and parameters of norms."""
    names = {name for name, _ in model.named_parameters() if "bias" in name.rpartition(".")[2].split("_")}
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            names |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return names
