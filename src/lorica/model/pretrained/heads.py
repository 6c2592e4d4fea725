"""The output head that is read past its forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorica.errors import StateError
from lorica.layers import LoraLayer, SavedModule, TrainedTokens


def check_head(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a loss that multiplies by the head's raw weight while the head carries an update.

    TRL's trainers and Liger's kernels do so to spare the logits; the update would neither act nor train. A
    head trained whole shows them its copy's weight, but not one for each row. A hook on a model that carries
    adapters, before each call.

    Args:
        model: the model.
        args: what its forward is about to be called with.
        kwargs: likewise, by name.

    Raises:
        StateError: naming the head.
    """
    if torch.compiler.is_compiling():
        return
    fused = kwargs.get("fused_lm_head") or type(model).forward.__module__.startswith("liger_kernel")
    if not fused:
        return
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if not isinstance(head, LoraLayer | SavedModule | TrainedTokens):
        return
    if head.adapter_state.rows is not None or (isinstance(head, LoraLayer) and head.acting()):
        path = next(path for path, module in model.named_modules() if module is head)
        raise StateError(
            f"{path} carries an adapter, but this trainer's fused loss reads {path}.weight without calling "
            f"the layer, so the adapter would be neither used nor trained; leave {path!r} out of "
            "target_modules, train it whole by modules_to_save, or use a trainer that computes the logits "
            "(transformers' own)"
        )
