"""What a model calls the projections that LoRA's tutorials adapt."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from lorica.errors import ConfigError
from lorica.train.embedded import resolve_model
from lorica.train.quiet import quiet
from lorica.train.recipe import Recipe

_PAIRS = (("query", "value"), ("q_lin", "v_lin"), ("q_proj", "v_proj"), ("q", "v"))


def query_and_value(recipe: Recipe) -> tuple[str, str]:
    """Names of the query and value projections of a recipe's model.

    Raises:
        ConfigError: it has none apart from each other; the space must then say what to target.
    """
    with quiet(), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(resolve_model(recipe.model), trust_remote_code=False)
            model = AutoModel.from_config(config)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the configuration of {recipe.model!r}: {error}") from error
    leaves = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    found = next((pair for pair in _PAIRS if set(pair) <= leaves), None)
    if found is None:
        raise ConfigError(
            f"{recipe.model!r} has no query and value projections of their own, which the default space "
            f"targets; give a space, with method.target_modules among {', '.join(sorted(leaves))}"
        )
    return found
