"""Training that begins with another adapter's weights, as the LoRA paper's RTE and STS-B with MNLI's."""

from __future__ import annotations

import dataclasses

from torch import nn

from lorica.adapter import Adapter
from lorica.errors import AdapterError, listing
from lorica.model.structure import adapted
from lorica.model.values import extract, overwrite, trained_copies


def warm_start(model: nn.Module, start: Adapter, *, head: bool) -> None:
    """Give the one adapter on a model the weights of another.

    Args:
        model: adapted model.
        start: the weights to begin with.
        head: take the modules that are trained whole too, such as the classifier; else they stay as they are.

    Raises:
        AdapterError: the adapter on the model has other layers, ranks or scales; the model is untouched.
    """
    own = extract(model)
    scales = {
        path: (factors.scale, own.factors[path].scale)
        for path, factors in start.factors.items()
        if path in own.factors
    }
    unlike = [
        f"{path} ({theirs:g}, here {ours:g})" for path, (theirs, ours) in scales.items() if theirs != ours
    ]
    if unlike:
        raise AdapterError(
            f"init_from has another scale in {listing(unlike, limit=3)}; give method.r, method.lora_alpha "
            "and method.use_rslora the values that it was trained with"
        )
    if not head:
        root, state = adapted(model)
        heads = {copy.base_name for copy in trained_copies(root, state, state.one(None))}
        theirs = {name: tensor for name, tensor in start.extras.items() if name not in heads}
        ours = {name: tensor for name, tensor in own.extras.items() if name in heads}
        start = dataclasses.replace(start, extras={**theirs, **ours})
    try:
        overwrite(model, start)
    except AdapterError as error:
        hint = "; leave init_head off for a head of another shape" if head else ""
        raise AdapterError(f"init_from cannot start this training: {error}{hint}") from error
