"""A line about adapted layers that a whole pass of the model never called: their adapters did nothing in it.

    first pass  ──▶  each layer tells that it was called  ──▶  those of which none did are named, once

Between passes nothing watches but one hook on the model, and after its first pass not even that.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorica.errors import LoricaWarning, listing
from lorica.layers import LoraAttention, LoraLayer, LoraReadLinear, ReadWeight
from lorica.model.watch.agreement import compare_ranks
from lorica.state import STATE
from lorica.tree import walk

# Layers that need no call: the module around them reads their weight.
_READ = (ReadWeight, LoraReadLinear, LoraAttention)
# In inference these run one fused kernel, unless a hook stands on them or inside them.
FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
# With these a pass leaves out a part of the model.
_INSTEAD = ("encoder_outputs", "inputs_embeds", "decoder_inputs_embeds")


def watch_pass(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Have each adapted layer tell that it is called, until the end of this pass."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if "_is_fsdp_managed_module" in root.__dict__:
        hook = compare_ranks(root, root.__dict__[STATE])
        if hook is not None:
            hook(root, args)
    if any(kwargs.get(name) is not None for name in _INSTEAD):
        return
    waiting = {
        path: layer
        for path, layer, _ in walk(root)
        if path and isinstance(layer, LoraLayer) and not isinstance(layer, _READ)
    }
    if not waiting:  # merged, or all of them are read
        return
    root.__dict__[STATE].watch.remove()
    if any(isinstance(module, FUSED) for module in root.modules()):
        return
    called: set[nn.Module] = set()
    handles = [
        layer.register_forward_pre_hook(lambda layer, _: called.add(layer)) for layer in waiting.values()
    ]

    def end(root: nn.Module, args: Any, output: Any) -> None:
        for handle in handles:
            handle.remove()
        if output is None:  # it failed on the way
            root.__dict__[STATE].watch = root.register_forward_pre_hook(watch_pass, with_kwargs=True)
        else:
            _name(root, waiting, called)

    handles.append(root.register_forward_hook(end, always_call=True))


def _name(root: nn.Module, layers: Mapping[str, LoraLayer], called: set[nn.Module]) -> None:
    state = root.__dict__.get(STATE)
    if state is None:
        return
    # One expert of many, or one block that was dropped, is no sign; a kind of which none was called is.
    seen = {_kind(path) for path, layer in layers.items() if layer in called}
    silent = [path for path in layers if _kind(path) not in seen | state.uncalled]
    state.uncalled |= {_kind(path) for path in silent}
    if silent:
        warnings.warn(
            f"a whole pass of the model did not call {listing(silent, limit=6)}: adapters there did nothing "
            "in it. That may be as it should, as with images for a batch of texts; else leave them out "
            "(exclude_modules)",
            LoricaWarning,
            stacklevel=4,
        )


def _kind(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
