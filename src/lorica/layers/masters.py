"""Float32 copies of half-precision modules; they compute with their values rounded to the base's dtype.

    float32 copy ── cast, with a graph ──▶ float16 ──▶ the module's own forward
         ▲                                   │
         └──────── gradient in float32 ──────┘

The module always sees weights in the base's dtype, so outputs have that dtype too, and merging, which rounds
the copy once, changes none of them.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorica.tree import parameter_at

HALVES = (torch.float16, torch.bfloat16)
"""The dtypes in which training would lose small steps."""


def lowered(twin: nn.Module, base: nn.Module) -> nn.Module:
    """A view of a copy whose parameters are cast, with a graph, to the dtype of the base's.

    Buffers, hooks and everything else are the copy's own. Each call makes its own view, so threads that call
    one copy do not see each other's.

    Args:
        twin: the copy.
        base: the original module; parameters that it no longer has are not cast.
    """
    view = twin.__class__.__new__(twin.__class__)
    view.__dict__.update(twin.__dict__)
    own, originals = _held(twin), _held(base)
    if own is not twin._parameters:
        # accelerate's forward would bring the values to the copy, not to the view.
        view.__dict__.pop("forward", None)
    view.__dict__["_parameters"] = {name: _cast(p, originals.get(name)) for name, p in own.items()}
    view.__dict__["_modules"] = {
        name: part if part is None or (other := base._modules.get(name)) is None else lowered(part, other)
        for name, part in twin._modules.items()
    }
    return view


def call_lowered(twin: nn.Module, base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a copy so that it computes in the base's dtype.

    Args:
        twin: the copy.
        base: the original module.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    if isinstance(twin, (nn.Linear, nn.modules.conv._ConvNd)):
        # Code that casts the input to `weight.dtype`, as T5 does, has read float32.
        args = tuple(_fitted(x, twin.weight, base) for x in args)
    if torch.compiler.is_compiling():  # the compiler knows this one, and takes no threads at once
        names = [name for name, _ in twin.named_parameters(remove_duplicate=False)]
        cast = {name: _cast(twin.get_parameter(name), parameter_at(base, name)) for name in names}
        return torch.func.functional_call(twin, cast, args, dict(kwargs), tie_weights=False)
    return lowered(twin, base)(*args, **kwargs)


def _cast(own: Tensor | None, original: Tensor | None) -> Any:
    if own is None or original is None or own.dtype == original.dtype or original.dtype not in HALVES:
        return own
    return own.to(original.dtype)


def _held(module: nn.Module) -> dict[str, Any]:
    """A module's parameters, from accelerate's store if it keeps them elsewhere."""
    hook = module.__dict__.get("_hf_hook")
    kept = getattr(hook, "weights_map", None)
    if hook is None or kept is None:
        return module._parameters
    return {
        name: None if p is None else kept[name].to(hook.execution_device)
        for name, p in module._parameters.items()
    }


def _fitted(x: Any, weight: Tensor, base: nn.Module) -> Any:
    original = _held(base)["weight"]
    assert original is not None
    if not isinstance(x, Tensor) or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return _cast(x, original)


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


class Lowering(CallHooks):
    """Hooks that round a module's float32 copies of parameters to the base's dtype during its calls.

    The copies replace the base's own parameters (`lorica.pieces.copies`), and every reader finds them. Only
    the module itself sees the base's dtype, while it computes.
    """

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Put the rounded values in place, and cast an input that was cast to a copy's dtype."""
        with guard():
            self.inside += 1
            if self.inside == 1:
                self._round(module)
            weight: Any = module._parameters["weight"] if "weight" in self.kept else None
        if weight is None or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            return None
        return tuple(_as_computed(x, weight.dtype) for x in args)

    def _round(self, module: nn.Module) -> None:
        originals = self.state.originals
        with torch.enable_grad():  # other threads may train with the same values
            for leaf, own in list(module._parameters.items()):
                if own is None or own.dtype != torch.float32 or self.own + leaf not in originals:
                    continue
                dtype = self.state.dtype_now(originals[self.own + leaf])
                if dtype in HALVES:
                    self.kept[leaf] = own
                    module._parameters[leaf] = own.to(dtype)  # type: ignore[assignment]

    def after(self, module: nn.Module, args: Any, output: object) -> None:
        """Put the copies back."""
        with guard():
            self.inside -= 1
            if not self.inside:
                module._parameters.update(self.kept)
                self.kept = {}


def lower(module: nn.Module, state: Any, path: str) -> None:
    """Have a module compute with rounded copies (`Lowering`), unless it does already.

    Args:
        module: the module whose parameters have float32 copies.
        state: the model's state.
        path: the module's path.
    """
    if not any(
        isinstance(getattr(h, "__self__", None), Lowering) for h in module._forward_pre_hooks.values()
    ):
        Lowering(state, path).put(module)


def _as_computed(x: Any, dtype: torch.dtype) -> Any:
    fitted = isinstance(x, Tensor) and x.dtype == torch.float32
    return x.to(dtype) if fitted and not torch.is_autocast_enabled(x.device.type) else x
