"""Modules trained whole (`modules_to_save`), such as a new classification head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica.layers.masters import HALVES, call_lowered, lowered
from lorica.layers.swapped import SwappedModule
from lorica.state import AdapterState
from lorica.tree import is_sharded


class SavedModule(SwappedModule):
    """A module with a trained copy per adapter; the active adapter's copy answers for it.

    Its parameters, buffers and parts, read or assigned, are the acting copy's. Scripts that initialise a head
    anew need that, and so do fused losses that multiply by the head's weight, `nn.MultiheadAttention` and
    `nn.TransformerEncoderLayer`, which never call some of their parts. `state_dict` and `named_parameters`
    list both the original and the copies, each under its own name.

    Beside a base in half precision the copies are float32, as A and B are, so that small steps are not lost
    and a `GradScaler` can unscale their gradients. They compute with their values rounded to the base's
    dtype; see `lorica.layers.masters`.

    Attributes:
        masters: the adapters whose copy has a higher precision than the base.
    """

    label: ClassVar[str] = "Saved"
    own_modules = ("modules_to_save",)
    own_attributes = ("adapter_state", "masters")
    modules_to_save: nn.ModuleDict
    masters: set[str]

    @classmethod
    def refusal(cls) -> str:  # noqa: D102
        return (
            " is trained whole by another adapter (modules_to_save) and cannot take a low-rank update beside "
            "that"
        )

    def prepare(self) -> None:  # noqa: D102
        self.modules_to_save = nn.ModuleDict()
        self.__dict__["masters"] = set()

    def add_copy(self, name: str, twin: nn.Module, *, master: bool) -> None:
        """Add an adapter's copy.

        Args:
            name: the adapter's name.
            twin: the copy, made by `twin_of`.
            master: whether the copy has a higher precision than the module.
        """
        self.modules_to_save[name] = twin
        if master:
            self.masters.add(name)

    def base_state(self) -> dict[str, Tensor]:
        """The original module's state, without the copies."""
        return {
            key: value for key, value in self.state_dict().items() if not key.startswith("modules_to_save.")
        }

    def remove_copy(self, name: str) -> None:
        """Remove an adapter's copy."""
        del self.modules_to_save[name]
        self.masters.discard(name)

    def acting_copy(self) -> nn.Module | None:
        """The active adapter's copy; None if the original answers."""
        name = self.acting_name()
        return None if name is None else self.modules_to_save[name]

    def acting_name(self) -> str | None:
        """The active adapter with a copy; None if the original answers."""
        # At most one: the state lets no two adapters act that copy the same module.
        active = self.adapter_state.active
        return next((name for name in self._copies() if name in active), None)

    def answering(self, name: str) -> nn.Module:
        """An adapter's copy in the base's precision, in which it computes."""
        twin = self.modules_to_save[name]
        return lowered(twin, self) if name in self.masters else twin

    def _answer(self, name: str | None, /, *args: Any, **kwargs: Any) -> Any:
        """The output of an adapter's copy, or of the original module."""
        if name is None:
            return super().forward(*args, **kwargs)
        twin: nn.Module = self._copies()[name]
        return call_lowered(twin, self, args, kwargs) if name in self.masters else twin(*args, **kwargs)

    def _copies(self) -> dict[str, Any]:
        return self._modules["modules_to_save"]._modules  # type: ignore[union-attr]  # faster than by name

    def __getattr__(self, name: str) -> Any:
        """A parameter, buffer or part: the acting copy's."""
        # Python calls this only for names that plain lookup does not find.
        own = name in self.own_modules or self.shard_of(name) is not None
        twin = None if own else self.acting_copy()
        return super().__getattr__(name) if twin is None else getattr(twin, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a parameter, buffer or part of the acting copy, or any other attribute of the module."""
        own = is_sharded(value) or is_sharded(self.__dict__.get("_parameters", {}).get(name))
        # Parts of tensors come and go by fully_shard's hand, which knows the copy's by itself.
        twin = self.acting_copy() if name in _held(self) and not own else None
        if twin is None:
            super().__setattr__(name, value)
        else:
            setattr(twin, name, value)

    def shows(self, name: str) -> bool:  # noqa: D102
        return name in _held(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the acting copy or the original; in a mixed batch, each row's own."""
        rows = self.adapter_state.rows
        if rows is not None:
            return rows.call(self, self.modules_to_save.keys(), self._answer, *args, **kwargs)
        return self._answer(self.acting_name(), *args, **kwargs)


def twin_of(
    module: nn.Module, parent: nn.Module | None, known: AdapterState | None = None
) -> tuple[nn.Module, bool]:
    """A copy of a module for an adapter, and whether the copy has a higher precision.

    Args:
        module: the module, with or without copies for other adapters.
        parent: the module that holds it. If it reads the module's weights without calling it, the copy keeps
            their dtype.
        known: the model's state, which may be referenced from the module and is not copied.
    """
    state = module.leave() if isinstance(module, SavedModule) else None
    try:
        twin = copy.deepcopy(module, {} if known is None else {id(known): known})
    finally:
        if state is not None:
            SwappedModule.enter(module, state)
    # The module's own hooks run whichever copy answers; copied hooks would run a second time.
    for hooks in (
        twin._forward_pre_hooks,
        twin._forward_hooks,
        twin._backward_pre_hooks,
        twin._backward_hooks,
    ):
        hooks.clear()
    return twin, not read_by(parent, module) and _raise_precision(twin)


def _raise_precision(twin: nn.Module) -> bool:
    """Turn a copy's half-precision parameters into float32; returns whether there were any.

    Recurrent layers, which hold their weights twice, and scripted modules, which run outside Python, keep and
    train the base's dtype.
    """
    if any(isinstance(part, (nn.RNNBase, torch.jit.ScriptModule)) for part in twin.modules()):
        return False
    low = [parameter for parameter in twin.parameters() if parameter.dtype in HALVES]
    for parameter in low:
        parameter.data = parameter.data.float()
    return bool(low)


def _held(module: nn.Module) -> set[str]:
    """Names of a module's parameters, buffers and parts, without the copies."""
    tables = (module.__dict__.get(table, {}) for table in ("_parameters", "_buffers", "_modules"))
    return {name for table in tables for name in table} - {"modules_to_save"}


READERS: list[Callable[[nn.Module, nn.Module], bool]] = []
"""(Part, the module that holds it) → whether that one reads the part's weights without calling it."""


def read_by(parent: nn.Module | None, part: nn.Module) -> bool:
    """Whether a module reads the weights of a part without calling it, always or sometimes."""
    return parent is not None and any(reads(part, parent) for reads in READERS)
