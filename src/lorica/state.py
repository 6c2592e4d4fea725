"""What a model carries: its adapters by name, which of them act, and what was set aside for them.

One state is shared by a model and all its adapted layers, so that choosing another adapter costs the same
however many layers or adapters there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.choice import Choice, Choices
from lorica.config import AdapterConfig
from lorica.errors import AdapterError, StateError, listing, nearest

_COMPILED = "_orig_mod"
"""Name of the module that `torch.compile` wraps."""


@dataclass(eq=False)
class Start:
    """A start that was taken out of W0.

    Args:
        weight: what stands in W0's place while the adapter acts: W0 less the start, or W0 quantized.
        A: the start's own A (r, d_in), to tell what training changed; None where W0 was quantized.
        B: its B (d_out, r).
    """

    weight: Parameter
    A: Tensor | None = None
    B: Tensor | None = None


@dataclass(eq=False)
class AdapterState(Choices):
    """State shared by an adapted model and its layers; `Choices` says which adapters act.

    Args:
        configs: adapter name → how it was made, in the order of arrival.
        slots: adapter name → parameter name in the base → the parameter that takes its place while the
            adapter acts (trained biases).
        starts: adapter name → name of a weight in the base → what the adapter's start made of it, and puts in
            its place while the adapter acts. W0 itself is never written to.
        statistics: adapter name → name of a running statistic in the base → the adapter's own.
        whole: adapter name → path of a module that it trains → its rows of it, or None for all of it.
        parts: adapter name → places of what it adds to the model.
        originals: parameters and buffers whose place is taken at the moment.
        bringers: their names → the adapter whose own stands there.
        axes: what mixtures have found out about the layers' inputs.
        shown: the kinds of calls for which the model was shown one row alone.
        hooks: of mixtures, on the model and its parts; until `detach`.
        frozen: parameters that `adapt` froze and `detach` thaws.
        layouts: quantized layers that `adapt` keeps from repacking their weights, until `detach`.
        classes: the names of the classes of each head, where adapters bring their own.
        labels: of the call that is running, where a prefix needs them.
        layout: where a prefix stands in the call that is running.
        stack: how the list of blocks was exchanged (`layer_replication`), until `detach`.
        aside: what merging took off the model and `restore` puts back.
        uncalled: kinds of layers that a pass of the model did not call, as was said.
    """

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    slots: dict[str, dict[str, Parameter]] = field(default_factory=dict)
    starts: dict[str, dict[str, Start]] = field(default_factory=dict)
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    whole: dict[str, dict[str, frozenset[int] | None]] = field(default_factory=dict)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    originals: dict[str, Any] = field(default_factory=dict)
    bringers: dict[str, str] = field(default_factory=dict)
    axes: dict[Any, bool] = field(default_factory=dict)
    shown: set[Any] = field(default_factory=set)
    hooks: list[Any] = field(default_factory=list)
    frozen: list[Parameter] = field(default_factory=list)
    layouts: list[nn.Module] = field(default_factory=list)
    classes: Any = None
    labels: Any = None
    layout: Any = None
    stack: Any = None
    aside: Any = None
    uncalled: set[str] = field(default_factory=set)

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
        taken: dict[str, frozenset[int] | None] = {}
        for name in names:
            starts = self.starts.get(self.known(name), {})
            moved = self.moved(root, name)
            alone = (*self.slots.get(name, ()), *self.parts.get(name, ()), *starts, *moved)
            own = {**dict.fromkeys(alone), **self.whole.get(name, {})}
            for path, rows in own.items():
                if any(_overlap(path, other) and not _apart(rows, its) for other, its in taken.items()):
                    why = (
                        f"each took its start out of {path}; extract one and attach it again, and it stands "
                        "beside W0 itself"
                        if path in starts
                        else f"each brings its own {path}; updates of rank r add up, parameters trained "
                        "whole do not"
                    )
                    raise AdapterError(f"{listing(map(repr, names))} cannot act together: {why}")
            for path, rows in own.items():
                before = taken.get(path)
                taken[path] = rows | before if rows is not None and before is not None else rows
        self._put(root, names)
        self.decide(self.last._replace(names=names, placed=self.placed))
        self.name_classes()

    def name_classes(self) -> None:
        """Have the model's configuration name the classes of the head that acts for the model."""
        if self.classes is not None:
            self.classes.follow(self.shared)

    def present(self, choice: Choice) -> Choice:
        """A choice without the adapters that are gone."""
        return choice._replace(names=tuple(name for name in choice.names if name in self.configs))

    def _put(self, root: nn.Module, names: tuple[str, ...]) -> None:
        """Have the parameters of these adapters stand in the base's place, and those of no others."""
        bringing = tuple(name for name in names if self.stand_ins(name))
        if {*bringing} == {*self.placed}:
            return
        self.check_placing(bringing)
        # Of statistics, those that moved: only one adapter's did.
        ordered = sorted(bringing, key=lambda name: bool(self.moved(root, name)))
        incoming = {path: (name, p) for name in ordered for path, p in self.stand_ins(name).items()}
        self._check_devices(root, {**self.originals, **{path: p for path, (_, p) in incoming.items()}})
        for path, parameter in self.originals.items():
            self._note_moved(path, place(root, path, parameter))
            _tell(root, path, None)
        self.originals = {path: place(root, path, parameter) for path, (_, parameter) in incoming.items()}
        for path, original in self.originals.items():
            _tell(root, path, (incoming[path][0], original))
        self.placed, self.bringers = bringing, {path: name for path, (name, _) in incoming.items()}

    def _check_devices(self, root: nn.Module, coming: dict[str, Any]) -> None:
        """Refuse to exchange parameters for those of a model without values.

        Raises:
            StateError: naming one that was moved to the meta device.
        """
        for path, tensor in coming.items():
            owner, leaf = owner_of(root, path)
            if _table(owner, leaf)[leaf].is_meta != tensor.is_meta:
                raise StateError(
                    f"{path} was moved to the meta device, without values (accelerate's offloading?), and an "
                    "adapter has its own in that place; bring it back first "
                    "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), or choose before"
                )

    def choose(self, names: tuple[str, ...]) -> None:
        """As `activate`, asked for by a layer, which does not know the model it is in.

        Raises:
            AdapterError: as `activate`.
            StateError: an adapter is merged, or one that comes or goes has parameters to be placed in the
                model.
        """
        names = tuple(dict.fromkeys(map(self.known, names)))
        if names == self.active:
            return
        self.check_unmerged("choose another adapter")
        placing = [name for name in {*names, *self.active} if self.stand_ins(name)]
        if placing:
            raise StateError(
                f"{listing(map(repr, sorted(placing)))} changes parameters of the base (a start taken out of "
                "it, or trained biases), so a layer alone cannot switch it; call set_adapter on the model, "
                "or lorica.active"
            )
        self.activate(_NOWHERE, names)

    @contextlib.contextmanager
    def base_in_place(self, root: nn.Module) -> Iterator[None]:
        """Let no adapter act for a while, so that the base's own parameters stand in the model."""
        before = tuple(name for name in self.placed)
        self._put(root, ())
        try:
            with self.only_here(Choice()):
                yield
        finally:
            self._put(root, tuple(name for name in before if name in self.configs))

    def _note_moved(self, path: str, left: Tensor) -> None:
        """Keep an adapter's statistic as it leaves: a model that moves to a device has new ones."""
        own = self.statistics.get(self.bringers[path], {})
        if path in own:
            own[path] = left

    def stand_ins(self, name: str) -> dict[str, Tensor]:
        """Name of a parameter or buffer in the base → what takes its place while the adapter acts."""
        weights = {path: start.weight for path, start in self.starts.get(name, {}).items()}
        return {**self.slots.get(name, {}), **weights, **self.statistics.get(name, {})}

    def moved(self, root: nn.Module, name: str) -> dict[str, Tensor]:
        """The adapter's running statistics that are no longer the base's."""
        own = self.live_statistics(root, name)
        return {path: t for path, t in own.items() if not torch.equal(t, self.base_tensor(root, path).to(t))}

    def live_statistics(self, root: nn.Module, name: str) -> dict[str, Tensor]:
        """The adapter's running statistics, as they stand in the model while it acts."""
        own = self.statistics.get(name, {})
        return {path: _held(root, path) if self.bringers.get(path) == name else t for path, t in own.items()}

    def base_tensor(self, root: nn.Module, path: str) -> Tensor:
        """The base's own parameter or buffer of that name, whatever stands in its place."""
        if path in self.originals:
            return self.originals[path]
        return _held(root, path)

    def base_parameter(self, root: nn.Module, path: str) -> Parameter:
        """The base's own parameter of that name, whatever stands in its place."""
        return self.originals[path] if path in self.originals else parameter_at(root, path)


_NOWHERE = nn.Module()


def parameter_at(root: nn.Module, path: str) -> Parameter:
    """The parameter of that name, whatever an attribute shows in its stead."""
    owner, leaf = owner_of(root, path)
    parameter = owner._parameters[leaf]
    assert parameter is not None
    return parameter


def owner_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter or buffer of that name, and its name there."""
    owner, _, leaf = path.rpartition(".")
    return module_at(root, owner), leaf


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module of that name; wrappers that `torch.compile` put around modules are no part of names."""
    module = uncompiled(root)
    for name in path.split(".") if path else ():
        child = module._modules[name]
        assert child is not None
        module = uncompiled(child)
    return module


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside the wrapper that `torch.compile(module)` returns; others are returned as they are."""
    while (inside := module._modules.get(_COMPILED)) is not None:
        module = inside
    return module


def as_uncompiled(name: str) -> str:
    """A live name of a tensor or module without what `torch.compile` put into it."""
    return name.replace(f"{_COMPILED}.", "")


def place(root: nn.Module, path: str, parameter: Any) -> Any:
    """Put a parameter or buffer where `path` says; returns the one that was there.

    It follows what was there to the device and dtype that the model moved to in the meantime.
    """
    owner, leaf = owner_of(root, path)
    before = _table(owner, leaf)[leaf]
    assert before is not None
    if parameter.device != before.device or parameter.dtype != before.dtype:
        parameter.data = parameter.data.to(before)
    _table(owner, leaf)[leaf] = parameter
    return before


def _held(root: nn.Module, path: str) -> Tensor:
    """The parameter or buffer that stands where `path` says."""
    owner, leaf = owner_of(root, path)
    return _table(owner, leaf)[leaf]


def _table(module: nn.Module, leaf: str) -> Any:
    """The table in which a module has a parameter or buffer of that name."""
    return module._buffers if leaf in module._buffers else module._parameters


def _tell(root: nn.Module, path: str, displaced: tuple[str, Parameter] | None) -> None:
    """Tell an adapted layer whose weight stands in W0's place, and what W0 is; None that W0 stands."""
    owner, leaf = owner_of(root, path)
    if "displaced" in owner.__dict__ and leaf == owner.weight_name:
        owner.__dict__["displaced"] = displaced


def _apart(rows: frozenset[int] | None, other: frozenset[int] | None) -> bool:
    """Whether two adapters train rows of a module that are none of them the same."""
    return rows is not None and other is not None and rows.isdisjoint(other)


def _overlap(path: str, other: str) -> bool:
    """Whether one path is the other, or inside it."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")
