"""An adapter that was put on a model without values, and never given any: an error in the first pass.

meta device ── to_empty ──▶ NaN in all that adapters hold ── materialize, load_weights ──▶ values
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import StateError, listing
from lorica.layers import SwappedModule
from lorica.state import AdapterState
from lorica.tree import is_sharded, join


def watch_filling(root: nn.Module, state: AdapterState) -> None:
    """Look in the first pass with values whether adapters have theirs."""

    def check(root: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        # Not by way of pieces: a state_dict of a part would have fully_shard take its weights apart again.
        own = {
            join(path, name, leaf): tensor
            for path, module in root.named_modules()
            if isinstance(module, SwappedModule)
            for name in module.own_modules
            for leaf, tensor in getattr(module._modules.get(name), "named_parameters", dict)()
        }
        if any(tensor.is_meta for tensor in own.values()):
            return
        bare = [name for name, tensor in own.items() if _has_none(tensor)]
        if bare:
            raise StateError(
                "an adapter was put on a model without values (the meta device), and given none since: "
                f"{listing(bare, limit=4)}. Call on every rank "
                "lorica.parallel.materialize(model, base, seed=...), or lorica.load_weights(model, folder)"
            )
        handle.remove()

    handle = root.register_forward_pre_hook(check)
    state.hooks.append(handle)


def _has_none(tensor: Tensor) -> bool:
    part: Any = tensor.detach()
    first = (part.to_local() if is_sharded(part) else part).flatten()[:1]
    return first.is_floating_point() and bool(first.isnan().any())
