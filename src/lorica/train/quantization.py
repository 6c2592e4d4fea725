"""Loading a recipe's base quantized."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from lorica.errors import require
from lorica.model.selection import HEADS
from lorica.train.recipe import Recipe
from lorica.train.tasks import Task


def quantized_loading(recipe: Recipe, task: Task) -> dict[str, Any]:
    """What `from_pretrained` needs to load the base as the recipe's `quantization` says; nothing for None.

    Scales are packed too (double quantization), and products are taken in the dtype the recipe trains in.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    if recipe.quantization is None:
        return {}
    require("bitsandbytes", extra="quantized")
    training = recipe.training
    # The head is new and trains whole. None leaves it to transformers, which spares output embeddings.
    skip = list(HEADS.get(task.task_type or "", ())) or None
    if recipe.quantization == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16
            if training.bf16
            else torch.float16
            if training.fp16
            else torch.float32,
            llm_int8_skip_modules=skip,
        )
    return {"quantization_config": config}
