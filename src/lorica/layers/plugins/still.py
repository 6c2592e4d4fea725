"""Batch norms whose running statistics do not move, although the model is in training.

While no adapter's own statistics are in place (`mixed`, `disabled`, a frozen adapter), a pass moves copies,
which are dropped after it.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lorica.state import AdapterState
from lorica.tree import walk


class Still:
    """Hooks around one layer's calls that keep the base's running statistics as they are.

    Args:
        state: the model's state.
        path: the layer's path.
    """

    def __init__(self, state: AdapterState, path: str) -> None:
        self.state = state
        self.own = path and f"{path}."
        self.inside = 0
        self.kept: dict[str, Any] = {}

    def before(self, layer: nn.Module, args: Any) -> None:
        """In training, replace the base's statistics by copies."""
        if not layer.training or f"{self.own}running_mean" in self.state.originals:
            return
        with _guard():
            self.inside += 1
            if self.inside == 1:
                self.kept = {leaf: b for leaf, b in layer._buffers.items() if b is not None}
                layer._buffers.update({leaf: buffer.clone() for leaf, buffer in self.kept.items()})

    def after(self, layer: nn.Module, args: Any, output: object) -> None:
        """Put the base's own statistics back."""
        if not self.inside:
            return
        with _guard():
            self.inside -= 1
            if not self.inside:
                layer._buffers.update(self.kept)
                self.kept = {}


_LOCK = threading.Lock()


def _guard() -> contextlib.AbstractContextManager[Any]:
    """A lock, because two threads may train in one layer; none under a compiler, which knows no locks."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _LOCK


def keep_still(root: nn.Module, state: AdapterState) -> None:
    """Let no pass move the base's own running statistics, until `release`.

    Args:
        root: the model, before its first adapter.
        state: the model's state.
    """
    for path, module, _ in walk(root):
        if isinstance(module, _NormBase) and module._buffers.get("running_mean") is not None:
            still = Still(state, path)
            module.register_forward_pre_hook(still.before)
            module.register_forward_hook(still.after, always_call=True)


def release(root: nn.Module) -> None:
    """Undo `keep_still`; also for a copy of a module, which has statistics of its own."""
    for module in root.modules():
        if isinstance(module, _NormBase):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [
                    k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Still)
                ]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
