"""Which recipes can be trained together on one base, and why others cannot.

Whatever of `method`, `baseline` and `training` differs can be joint; the task, the model and the data cannot.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from lorica.config.inits import FROM_DATA
from lorica.train.recipe import Recipe

_ARGUMENTS = (
    "torch_compile",
    "deepspeed",
    "fsdp",
    "auto_find_batch_size",
    "full_determinism",
    "use_liger_kernel",
    "use_cpu",
    "bf16_full_eval",
    "fp16_full_eval",
    "parallelism_config",
)


def why_alone(recipe: Recipe) -> str | None:
    """Why a recipe has to be trained by itself; None if it can share a base with others."""
    training = recipe.training
    if recipe.quantization is not None:
        return f"its base is quantized ({recipe.quantization})"
    for name in ("fp16", "gradient_checkpointing"):
        if getattr(training, name):
            return f"training.{name} changes how the base is computed"
    if training.auto_batch_size:
        return "training.auto_batch_size measures the memory of one training"
    for name in _ARGUMENTS:
        if training.arguments.get(name):
            return f"training.arguments.{name} changes how the base is computed"
    start = getattr(recipe.configuration(), "init_lora_weights", True)
    if start in FROM_DATA:
        return f"it starts from data (init_lora_weights={start!r})"
    if torch.cuda.device_count() > 1:
        return "several GPUs are visible, over which the trainer spreads each model"
    return None


def shared_fields(name: str) -> bool:
    """Whether recipes that differ in a field, by its dotted name, can share a base."""
    part, _, leaf = name.partition(".")
    apart = ("bf16", "fp16", "gradient_checkpointing", "auto_batch_size", "arguments")
    own = ("method", "baseline", "init_from", "init_head", "generation")
    return part in own or (part == "training" and leaf not in apart)


def base_of(recipe: Recipe) -> str:
    """What recipes must agree in to share a base."""
    return json.dumps([recipe.task, recipe.model, asdict(recipe.data), recipe.training.bf16], sort_keys=True)
