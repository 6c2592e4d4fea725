"""LoRA-GA: factors from the first gradients of each weight, with PEFT's names and arguments."""

from __future__ import annotations

import os

from torch import nn

from lorica.config import LoraConfig
from lorica.model import starts
from lorica.model.starts.preprocess import Data
from lorica.peft.utils.other import named_whole, without_idle


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Data,
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Find each weight's gradient over some batches; see `lorica.model.starts.preprocess_loraga`.

    Args:
        model: the model, not adapted yet.
        lora_config: with ``init_lora_weights="lora_ga"`` and a `lora_ga_config`.
        train_step: a function that runs the model on some data and calls `backward`, or batches.
        cache_file: file for the gradients; read if it exists.
    """
    starts.preprocess_loraga(
        model, named_whole(model, without_idle(model, lora_config)), train_step, cache_file
    )
