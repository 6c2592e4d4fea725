"""Hooks around a module's calls that exchange some of its tensors meanwhile."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

_LOCK = threading.Lock()


def guard() -> contextlib.AbstractContextManager[Any]:
    """A lock, because two threads may call one module; none under a compiler, which knows no locks."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _LOCK


class CallHooks(ABC):
    """A hook before each call of one module and one after it.

    Args:
        state: the model's state (`lorica.state.AdapterState`).
        path: the module's path.

    Attributes:
        inside: number of calls that run.
        kept: name in the module → the tensor that is out of its place meanwhile.
    """

    def __init__(self, state: Any, path: str) -> None:
        self.state = state
        self.own = path and f"{path}."
        self.inside = 0
        self.kept: dict[str, Any] = {}

    @abstractmethod
    def before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Exchange tensors; may return other arguments."""

    @abstractmethod
    def after(self, module: nn.Module, args: Any, output: object) -> None:
        """Put them back."""

    def put(self, module: nn.Module) -> None:
        """Put the hooks on a module."""
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after, always_call=True)

    @classmethod
    def off(cls, module: nn.Module) -> None:
        """Take hooks of this class off a module."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), cls):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
