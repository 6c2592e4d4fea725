"""LoRA+: a higher learning rate for B than for A."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lorica.errors import ConfigError


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer whose learning rate for B is a multiple of that for A.

    Args:
        model: adapted model.
        optimizer_cls: the optimizer's class, such as ``torch.optim.AdamW``.
        lr: learning rate of A, and of modules trained whole.
        loraplus_lr_ratio: learning rate of B, and of vectors such as biases and magnitudes, over `lr`.
        kwargs: ``loraplus_weight_decay`` (0; biases have none), ``loraplus_lr_embedding`` (1e-6; for both
            factors of an embedding), and the optimizer's own arguments.

    Returns:
        The optimizer, its groups in PEFT's order.

    Raises:
        ConfigError: nothing trains.

    Source:
        LoRA+: Efficient Low Rank Adaptation of Large Models (Hayou, Ghosh, Yu, 2024), section 4.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    slow: list[Parameter] = []
    embedding: list[Parameter] = []
    fast: list[Parameter] = []
    undecayed: list[Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding_" in name:
            embedding.append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            (undecayed if "bias" in name or _of_norm(model, name) else fast).append(parameter)
        else:
            slow.append(parameter)
    if not (slow or embedding or fast or undecayed):
        raise ConfigError("no parameter of the model trains; adapt it first, or unfreeze what should train")
    groups: list[dict[str, Any]] = [
        {"params": slow, "weight_decay": decay, "lr": lr},
        {"params": embedding, "weight_decay": decay, "lr": embedding_lr},
        {"params": fast, "weight_decay": decay, "lr": lr * loraplus_lr_ratio},
        {"params": undecayed, "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    ]
    return optimizer_cls(groups, lr=lr, **kwargs)


def _of_norm(model: nn.Module, name: str) -> bool:
    return "norm" in type(model.get_submodule(name.rpartition(".")[0])).__name__.lower()
