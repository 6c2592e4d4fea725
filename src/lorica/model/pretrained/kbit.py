"""Getting a quantized model ready to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from lorica.errors import StateError
from lorica.layers.quantized import quantizer_of
from lorica.model.merging.plugins.packed import packed_layers
from lorica.state import find_adapted
from lorica.tree import base_parameters

M = TypeVar("M", bound=nn.Module)


def prepare_model_for_kbit_training(
    model: M,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> M:
    """Freeze a quantized model, bring what is not quantized to float32, and save memory in its backward pass.

    As PEFT's function of this name does it, and like it before the model is adapted. `lorica.adapt` does not
    need it: norms and heads in float32 train more stably beside a 16-bit base, and cost memory.

    Args:
        model: the model, in place. Where it is not quantized, only its dtype and `requires_grad` change;
            where its layers take no input of another dtype (all but bitsandbytes'), its dtype does not.
        use_gradient_checkpointing: recompute activations in the backward pass; transformers' models only.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`; None is
            ``{"use_reentrant": False}``.

    Returns:
        The same model.

    Raises:
        StateError: it carries an adapter already, or has no gradient checkpointing and it was asked for.
    """
    if find_adapted(model) is not None:
        raise StateError(
            "the model carries an adapter already, which this would freeze; prepare it before that"
        )
    packed = packed_layers(model)
    quantized = bool(packed) or getattr(model, "is_quantized", False)
    enable = _checkpointing(model) if quantized and use_gradient_checkpointing else None
    # Other formats multiply in the dtype that the model was quantized in, and take no other.
    castable = all(q is not None and q.casts_input for q in map(quantizer_of, packed.values()))
    for name, parameter in base_parameters(model).items():
        parameter.requires_grad = False
        plain = name.rpartition(".")[0] not in packed and parameter.dtype in (torch.float16, torch.bfloat16)
        if plain and castable and (packed or not quantized):
            parameter.data = parameter.data.float()
    if enable is not None:
        enable(dict(gradient_checkpointing_kwargs or {"use_reentrant": False}))
        if not getattr(model, "_require_grads_hooks", None):
            model.enable_input_require_grads()  # type: ignore[operator]
    return model


def _checkpointing(model: nn.Module) -> Callable[[dict[str, Any]], None]:
    """Transformers' switch for gradient checkpointing, under its newer or its older name."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        switch: Any = getattr(model, name, None)
        if switch is not None:
            return switch
    raise StateError(
        f"{type(model).__name__} has no gradient checkpointing of transformers' kind; pass "
        "use_gradient_checkpointing=False"
    )
