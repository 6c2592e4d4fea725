"""Running statistics (batch norm), which move in training without being trained: each adapter has its own.

They stand in the base's place while their adapter acts, as trained biases do. So training moves the
adapter's, the base's stay bit for bit, and an adapter's file holds those that moved. A pass in training while
no adapter's own stand there (`mixed`, `disabled`, a frozen adapter) moves copies that are dropped after it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lorica.layers import SavedModule
from lorica.model.selection import within_any
from lorica.model.structure import walk
from lorica.state import AdapterState


def running(root: nn.Module, saved: Collection[str] = ()) -> dict[str, Tensor]:
    """Name → running statistic of a model, outside the modules that are trained whole.

    Args:
        root: the model.
        saved: paths of modules that are to be.
    """
    places = list(walk(root))
    whole = [*saved, *(place.path for place in places if isinstance(place.module, SavedModule))]
    return {
        f"{path}.{leaf}" if path else leaf: buffer
        for path, module, _ in places
        if isinstance(module, _NormBase) and not within_any(path, whole)
        for leaf, buffer in module._buffers.items()
        if buffer is not None
    }


def give_statistics(
    root: nn.Module,
    state: AdapterState,
    name: str,
    saved: Collection[str],
    given: Mapping[str, Tensor],
    *,
    trainable: bool,
) -> None:
    """Give an adapter running statistics of its own, before it acts.

    Args:
        root: the model, with the base's own in place.
        state: the model's.
        name: of the adapter.
        saved: paths of the modules that it trains whole.
        given: those that it comes with, by name.
        trainable: whether it moves the others too.
    """
    own = {}
    for path, buffer in running(root, saved).items():
        if path in given or trainable:
            own[path] = given.get(path, buffer).detach().to(buffer, copy=True)
    if own:
        state.statistics[name] = own


class Still:
    """Hooks around one layer's calls that keep the base's running statistics where they are.

    Args:
        state: of the model.
        path: of the layer.
    """

    def __init__(self, state: AdapterState, path: str) -> None:
        self.state = state
        self.own = path and f"{path}."
        self.inside = 0
        self.kept: dict[str, Any] = {}

    def before(self, layer: nn.Module, args: Any) -> None:
        """In training, put copies in the place of the base's statistics."""
        if not layer.training or f"{self.own}running_mean" in self.state.originals:
            return
        with _guard():
            self.inside += 1
            if self.inside == 1:
                self.kept = {leaf: b for leaf, b in layer._buffers.items() if b is not None}
                layer._buffers.update({leaf: buffer.clone() for leaf, buffer in self.kept.items()})

    def after(self, layer: nn.Module, args: Any, output: object) -> None:
        """Put the base's own back."""
        if not self.inside:
            return
        with _guard():
            self.inside -= 1
            if not self.inside:
                layer._buffers.update(self.kept)
                self.kept = {}


_LOCK = threading.Lock()


def _guard() -> contextlib.AbstractContextManager[Any]:
    """Two threads may train in one layer at once; a compiler traces in one, and knows no locks."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _LOCK


def keep_still(root: nn.Module, state: AdapterState) -> None:
    """Have no pass move the base's own running statistics, until `release`.

    Args:
        root: the model, when its first adapter comes.
        state: the model's.
    """
    for path, module, _ in walk(root):
        if isinstance(module, _NormBase) and module._buffers.get("running_mean") is not None:
            still = Still(state, path)
            module.register_forward_pre_hook(still.before)
            module.register_forward_hook(still.after, always_call=True)


def release(root: nn.Module) -> None:
    """Undo `keep_still`; for a copy of a module, too, whose statistics are its own."""
    for module in root.modules():
        if isinstance(module, _NormBase):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [
                    k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Still)
                ]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
