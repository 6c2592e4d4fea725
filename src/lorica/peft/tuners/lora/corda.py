"""CorDA: factors oriented by the covariance of each layer's inputs, with PEFT's names and arguments."""

from __future__ import annotations

from torch import nn

from lorica.config import LoraConfig
from lorica.model import starts
from lorica.model.starts.preprocess import Data
from lorica.peft.utils.other import named_whole, without_idle


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Data | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Measure the covariance of each layer's inputs; see `lorica.model.starts.preprocess_corda`.

    Args:
        model: the model, not adapted yet.
        lora_config: with ``init_lora_weights="corda"`` and a `corda_config`.
        run_model: a function that runs the model on some data, or batches. None if a file that `corda_config`
            names exists.
        hooked_model: the model that `run_model` runs, if it is another.
    """
    lora_config = named_whole(model, lora_config)
    starts.preprocess_corda(model, without_idle(model, lora_config), run_model, hooked_model=hooked_model)
