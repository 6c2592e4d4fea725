"""Batch norms whose running statistics do not move, although the model is in training.

While no adapter's own statistics are in place (`mixed`, `disabled`, a frozen adapter), a pass moves copies,
which are dropped after it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lorica.layers.hooks import CallHooks, guard
from lorica.state import AdapterState
from lorica.tree import walk


class Still(CallHooks):
    """Hooks around one layer's calls that keep the base's running statistics as they are."""

    def before(self, module: nn.Module, args: Any) -> None:
        """In training, replace the base's statistics by copies."""
        if not module.training or f"{self.own}running_mean" in self.state.originals:
            return
        with guard():
            self.inside += 1
            if self.inside == 1:
                self.kept = {leaf: b for leaf, b in module._buffers.items() if b is not None}
                module._buffers.update({leaf: buffer.clone() for leaf, buffer in self.kept.items()})

    def after(self, module: nn.Module, args: Any, output: object) -> None:
        """Put the base's own statistics back."""
        if not self.inside:
            return
        with guard():
            self.inside -= 1
            if not self.inside:
                module._buffers.update(self.kept)
                self.kept = {}


def keep_still(root: nn.Module, state: AdapterState) -> None:
    """Let no pass move the base's own running statistics, until `release`.

    Args:
        root: the model, before its first adapter.
        state: the model's state.
    """
    for path, module, _ in walk(root):
        if isinstance(module, _NormBase) and module._buffers.get("running_mean") is not None:
            Still(state, path).put(module)


def release(root: nn.Module) -> None:
    """Undo `keep_still`."""
    for module in root.modules():
        Still.off(module)
