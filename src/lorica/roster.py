"""What a model carries: its adapters by name, which of them act, and what was set aside for them.

One roster is shared by a model and all its adapted layers, so that choosing another adapter costs the same
however many layers or adapters there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn import Parameter

from lorica.config import AdapterConfig
from lorica.errors import AdapterError, StateError, listing, nearest


@dataclass(eq=False)
class Roster:
    """State shared by an adapted model and its layers.

    Args:
        configs: adapter name → how it was made, in the order of arrival.
        active: names of the adapters that act; their updates add up.
        slots: adapter name → parameter name in the base → the parameter that takes its place while the
            adapter acts (trained biases).
        whole: adapter name → paths of the modules of which it has a trained copy.
        parts: adapter name → places of what it adds to the model.
        originals: parameters whose place is taken at the moment.
        rows: which adapter acts on which row of the batch, in place of `active`.
        frozen: parameters that `adapt` froze and `detach` thaws.
        layouts: quantized layers that `adapt` keeps from repacking their weights, until `detach`.
        labels: of the call that is running, where a prefix needs them.
        layout: where a prefix stands in the call that is running.
        stack: how the list of blocks was exchanged (`layer_replication`), until `detach`.
        merged: names of the adapters that are merged into the weights at the moment.
        aside: what merging took off the model and `restore` puts back.
    """

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    slots: dict[str, dict[str, Parameter]] = field(default_factory=dict)
    whole: dict[str, tuple[str, ...]] = field(default_factory=dict)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    originals: dict[str, Parameter] = field(default_factory=dict)
    rows: Any = None
    frozen: list[Parameter] = field(default_factory=list)
    layouts: list[nn.Module] = field(default_factory=list)
    labels: Any = None
    layout: Any = None
    stack: Any = None
    merged: tuple[str, ...] = ()
    aside: Any = None

    def known(self, name: str) -> str:
        """The name, if there is such an adapter.

        Raises:
            AdapterError: there is none; the message lists those there are.
        """
        if name not in self.configs:
            have = listing(map(repr, self.configs)) or "none"
            raise AdapterError(
                f"no adapter is named {name!r}{nearest(name, self.configs)}; the model has: {have}"
            )
        return name

    def one(self, name: str | None) -> str:
        """The named adapter; for None, the only one there is or the only one active.

        Raises:
            AdapterError: None was given and the choice is not clear.
        """
        if name is not None:
            return self.known(name)
        candidates = list(self.configs) if len(self.configs) == 1 else list(self.active)
        if len(candidates) != 1:
            raise AdapterError(
                f"which adapter? The model has {listing(map(repr, self.configs))}; give its name"
            )
        return candidates[0]

    def check_unmerged(self, doing: str) -> None:
        """Refuse what needs the base's own weights.

        Raises:
            StateError: adapters are merged.
        """
        if self.merged:
            names = listing(map(repr, self.merged))
            raise StateError(
                f"cannot {doing} while {names} is merged into the weights; call lorica.restore(model) first"
            )

    def activate(self, root: nn.Module, names: tuple[str, ...]) -> None:
        """Let exactly these adapters act.

        Raises:
            AdapterError: unknown name, or two of them bring their own version of one parameter.
        """
        names = tuple(dict.fromkeys(names))
        taken: set[str] = set()
        for name in names:
            own = {
                *self.slots.get(self.known(name), ()),
                *self.whole.get(name, ()),
                *self.parts.get(name, ()),
            }
            for path in own:
                if any(_overlap(path, other) for other in taken):
                    raise AdapterError(
                        f"{listing(map(repr, names))} cannot act together: each brings its own {path}; "
                        "updates of rank r add up, parameters trained whole do not"
                    )
            taken |= own
        incoming = {path: p for name in names for path, p in self.slots.get(name, {}).items()}
        for path, parameter in self.originals.items():
            place(root, path, parameter)
        self.originals = {path: place(root, path, parameter) for path, parameter in incoming.items()}
        self.active = names


def place(root: nn.Module, path: str, parameter: Parameter) -> Parameter:
    """Put a parameter where `path` says; returns the one that was there."""
    owner, _, leaf = path.rpartition(".")
    parameters = root.get_submodule(owner)._parameters
    before = parameters[leaf]
    assert before is not None
    parameters[leaf] = parameter
    return before


def _overlap(path: str, other: str) -> bool:
    """Whether one path is the other, or inside it."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")
