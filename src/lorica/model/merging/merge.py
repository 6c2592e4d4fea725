"""Adapters in the weights: merging, switching, and the base back bit for bit.

Merging never writes to W0. Each adapted weight's parameter is replaced by a new one that holds W0 +
scale·B·A, computed in float32 and rounded once; the original parameter is set aside untouched, and `restore`
puts that same object back. While merged, the model's classes, module tree and keys are the base's own, so it
runs, saves and compiles as the base does.

    merge     W0 ──set aside──▶      switch     W0 + s·B'·A' computed afresh      restore     W0 ◀──put back──
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import Parameter

from lorica.adapter import Adapter
from lorica.choice import names_in
from lorica.config import family_of, method_of
from lorica.errors import StateError, listing
from lorica.folding import check_finite
from lorica.layers import LayerState, LoraLayer, SavedModule, SwappedModule
from lorica.layers.quantized import set_attribute
from lorica.model.merging.folded import (
    MergeReport,
    check_mergeable,
    fold_all,
    may_overflow,
    merged_states,
    room,
    state_loss,
)
from lorica.model.merging.steps import PACKED, STEPS, Into, MergeStep, Packed
from lorica.model.merging.untouched import Held, check_untouched, held
from lorica.model.pretrained import root as pretrained
from lorica.model.sharded import STREAM, check_whole
from lorica.state import AdapterState, adapted, in_group
from lorica.tree import owner_of, put_at, walk

M = TypeVar("M", bound=nn.Module)


@dataclass(eq=False)
class _Aside:
    """A module in its base form, with what `SwappedModule.enter` needs and what merging replaced in it."""

    path: str
    module: nn.Module
    state: LayerState
    originals: dict[str, Any]
    merged: dict[str, Any] = field(default_factory=dict)
    held: Held = field(default_factory=dict)

    def note(self) -> None:
        """Record the module's merged parameters."""
        self.held = held(self.module, self.originals)


@dataclass(eq=False)
class _Merged:
    """All that `restore` undoes.

    `shown` says whether the modules still have their adapted classes, with no adapter acting.
    """

    before: tuple[str, ...]
    modules: list[_Aside]
    steps: list[MergeStep]
    packed: Packed | None
    shown: bool = False

    @property
    def into(self) -> Into | None:
        """Packed weights with their updates; None where none took one."""
        return None if self.packed is None else self.packed.into

    def show(self) -> None:
        """Give the modules their adapted classes, with the merged weights in them."""
        if not self.shown:
            for item in self.modules:
                SwappedModule.enter(item.module, item.state)
        self.shown = True

    def hide(self) -> None:
        """Give the modules their base classes again."""
        if self.shown:
            for item in self.modules:
                assert isinstance(item.module, SwappedModule)
                item.state = item.module.leave()
        self.shown = False


def merge(
    model: nn.Module, names: str | Iterable[str] | None = None, *, into: Into | None = None
) -> MergeReport:
    """Merge adapters into the weights, in place; the model then runs at the base's own speed.

    Args:
        model: adapted model.
        names: an adapter's name, or several, whose updates add up; None takes the active ones.
        into: what quantized layers become. ``"quantized"``: their weight is unpacked, updated and packed
            again with the same settings, which rounds much of the update away. ``"dequantized"``: every
            quantized layer of the model, adapted or not, becomes a plain `nn.Linear` in the dtype of the
            model's other parameters. Required where an update goes into a quantized layer, and ignored
            elsewhere.

    Returns:
        The loss to rounding, layer by layer.

    Raises:
        StateError: an adapter is merged already, none is active, a layer cannot take its update, `into` is
            missing, or the model is sharded. The model is untouched.
        ConfigError: `into` has another value.
        AdapterError: no such adapter, or a merged weight would hold NaN or infinity. The model is untouched.

    Source: Hu et al., 2021, §4.1, "No additional inference latency".
    """
    root, state = adapted(model)
    state.check_unmerged("merge")
    state.check_alone("merge")
    if in_group():
        check_whole(root, "merge", STREAM)
    chosen = state.active if names is None else names_in(names)
    if not chosen:
        raise StateError("no adapter is active; say which to merge")
    _check_merges(state, chosen)
    before = state.active
    state.round(root, rounding=True)
    steps = [make(root, state) for make in STEPS]
    found = {place.path: place.module for place in walk(root)}
    swapped = {path: m for path, m in found.items() if isinstance(m, SwappedModule) and m.own_modules}
    layers = {path: m for path, m in swapped.items() if isinstance(m, LoraLayer)}
    try:
        state.activate(root, chosen)
        chosen = state.active
        for module in swapped.values():
            module.check_own_class()
        acting = {path: layer for path, layer in layers.items() if layer.acting()}
        packed = None
        if into is not None or any(layer.packed for layer in layers.values()):
            updated = [path for path, layer in acting.items() if layer.packed]
            packed = next((found for look in PACKED if (found := look(root, into, updated))), None)
        check_mergeable(acting, chosen)
        merged = merged_states(acting, chosen, packed and packed.plain)
        if packed is not None:
            packed.take(merged)
        others = other_values(swapped, chosen)
        losses = {path: state_loss(layers[path], chosen, tensors) for path, tensors in merged.items()}
    except BaseException:
        state.round(root, rounding=False)
        state.activate(root, before)
        raise
    if isinstance(root, pretrained.Pretrained):
        pretrained.leave(root)
        pretrained.keep_apart(root)
    weights = {} if packed is None else packed.weights
    states = {  # plain weights follow once the layers are in their base form
        path: {leaf: value for leaf, value in tensors.items() if path not in weights or leaf != "weight"}
        for path, tensors in merged.items()
    }
    aside = _Merged(
        before,
        [
            _set_aside(path, module, states.get(path, others.get(path, {})), chosen)
            for path, module in swapped.items()
        ],
        steps,
        packed,
    )
    if packed is not None:
        packed.do(root)
    untied = [path for step in steps for path in step.do(root)]
    for item in aside.modules:
        item.note()
    state.merged, state.aside = chosen, aside
    return MergeReport(chosen, losses, untied)


def switch(model: nn.Module, name: str) -> None:
    """Merge another adapter in place of the merged one, computed anew from W0; or merge a first one.

    W0 is never written to, so nothing drifts, however often this is called.

    Args:
        model: adapted model.
        name: the adapter's name.

    Raises:
        StateError: a layer cannot take its update, or merged weights were written to or replaced since. The
            merged adapter stays merged.
        AdapterError: no such adapter, or it holds NaN or infinity, or a merged weight would. The merged
            adapter stays merged.
    """
    root, state = adapted(model)
    _check_merges(state, (name,))
    state.check_alone("switch adapters")
    if in_group():
        check_whole(root, "switch what is merged", STREAM)
    if not state.merged:
        merge(model, name)
        return
    aside: _Merged = state.aside
    _check_untouched(root, aside)
    if aside.into is not None:
        _exchange(model, name, state.merged, aside.into)
        return
    shown = aside.shown
    aside.show()
    try:
        layers = _layers(aside, (name,))
        check_mergeable(layers, (name,))
        doubtful = [path for path, layer in layers.items() if may_overflow(layer, name)]
        if doubtful:
            factors = {
                path + key: holder.factors(name)
                for path, layer in layers.items()
                for key, _, holder in layer.holders(name)
            }
            Adapter(state.configs[name], factors).check_finite()
        for step in aside.steps:
            step.undo(root)
        try:
            _refill(root, state, (name,))
            for path in doubtful:
                for leaf in layers[path].changed((name,)):
                    check_finite(path, leaf, layers[path].get_base(leaf))
            state.merged = (name,)
        except BaseException:
            _refill(root, state, state.merged)
            raise
        finally:
            for step in aside.steps:
                step.do(root)
    finally:
        if shown:
            state.active = ()
        else:
            aside.hide()
        for item in aside.modules:
            item.note()


def restore(model: M) -> M:
    """Undo `merge`: W0 comes back bit for bit, for it is the same memory.

    The adapters are on their layers again, and those act that did before.

    Args:
        model: merged model.

    Returns:
        The same model.

    Raises:
        StateError: nothing is merged, or merged weights were written to or replaced since. The model is
            untouched.
    """
    root, state = adapted(model)
    if not state.merged:
        raise StateError("nothing is merged, so there is nothing to restore")
    aside: _Merged = state.aside
    _check_untouched(root, aside)
    aside.hide()
    if aside.packed is not None:
        aside.packed.undo(root)
    for item in aside.modules:
        SwappedModule.enter(item.module, item.state)
        _put_back(item)
    for step in aside.steps:
        step.undo(root)
    pretrained.enter(root)
    state.merged, state.aside = (), None
    state.round(root, rounding=False)
    state.activate(root, aside.before)
    return model


def _check_merges(state: AdapterState, names: Iterable[str]) -> None:
    """Refuse to merge an adapter that changes more than the base's weights.

    Raises:
        AdapterError: no such adapter.
        StateError: an adapter adds parts to the model.
    """
    for name in names:
        config = state.configs[state.known(name)]
        if not all(piece.mergeable for piece in state.placing(name)):
            parts = [part for part in config.parts() if family_of(part) == "additive"]
            guilty = listing(method_of(part) for part in parts or [config])
            raise StateError(
                f"{name!r} cannot be merged: {guilty} adds to what the model computes, with no place in its "
                "weights; use the adapter as it is"
            )


def _check_untouched(root: nn.Module, aside: _Merged) -> None:
    for item in aside.modules:
        check_untouched(root, item.path, item.module, item.held)


def _exchange(model: nn.Module, name: str, before: tuple[str, ...], into: Into) -> None:
    """`switch` for packed weights: the old ones cannot be filled again, so merge anew."""
    restore(model)
    try:
        merge(model, name, into=into)
    except BaseException:
        merge(model, before, into=into)
        raise


def _set_aside(path: str, module: SwappedModule, merged: dict[str, Any], names: tuple[str, ...]) -> _Aside:
    """Give a module its base form, with the merged values in it."""
    item = _Aside(path, module, None, {}, merged)  # type: ignore[arg-type]
    for leaf, value in merged.items():
        item.originals[leaf] = _put(module, leaf, value)
    if isinstance(module, SavedModule):
        _show_copy(item, module, names)
    item.state = module.leave()
    return item


def _refill(root: nn.Module, state: AdapterState, names: tuple[str, ...]) -> None:
    """Give the modules the merged values of other adapters, or the base's where those do nothing."""
    aside: _Merged = state.aside
    for item in aside.modules:
        _put_back(item)
    state.activate(root, names)
    layers = _layers(aside, names)
    merged: dict[str, dict[str, Parameter]] = {}
    for item in aside.modules:
        if isinstance(item.module, SavedModule):
            _show_copy(item, item.module, names)
        elif item.path in layers:
            merged[item.path] = room(layers[item.path], names, item.merged)
            item.merged |= merged[item.path]
    fold_all(layers, merged, names)
    merged |= other_values({item.path: item.module for item in aside.modules}, names)
    for item in aside.modules:
        for leaf, parameter in merged.get(item.path, {}).items():
            item.originals[leaf] = _put(item.module, leaf, parameter)


def _layers(aside: _Merged, names: tuple[str, ...]) -> dict[str, LoraLayer]:
    """Path → layer, for the layers that one of the adapters updates."""
    return {
        item.path: item.module
        for item in aside.modules
        if isinstance(item.module, LoraLayer) and any(name in item.module.scaling for name in names)
    }


def other_values(modules: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, dict[str, Parameter]]:
    """Path → name → merged value, for the swapped modules whose adapters have no update of rank r."""
    shared: dict[Any, Parameter] = {}
    found = {path: module.merged_values(path, names, shared) for path, module in modules.items()}
    return {path: own for path, own in found.items() if own}


def _show_copy(item: _Aside, module: nn.Module, names: tuple[str, ...]) -> None:
    """Put the tensors of the named adapters' copy into the module itself.

    A copy of higher precision than the module keeps its values; rounded ones go into the module.
    """
    assert isinstance(module, SavedModule)
    for name in names:
        if name in module.modules_to_save:
            shown = module.answering(name).state_dict(keep_vars=True)
            rounded: dict[Tensor, Parameter] = {}
            for path, tensor in module.modules_to_save[name].state_dict(keep_vars=True).items():
                if shown[path] is not tensor:
                    if tensor not in rounded:
                        rounded[tensor] = _kept(item.merged.get(path), shown[path].detach())
                    tensor = item.merged[path] = rounded[tensor]
                item.originals.setdefault(path, _put(module, path, tensor))


def _kept(before: Parameter | None, values: Tensor) -> Parameter:
    """A parameter with these values: the one merged before if it fits, or a new one."""
    if before is None or (before.dtype, before.device) != (values.dtype, values.device):
        return Parameter(values, requires_grad=False)
    before.data.copy_(values)
    return before


def put(module: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Put parameters, buffers or attributes into a module; returns those that it replaces."""
    return {path: _put(module, path, tensor) for path, tensor in tensors.items()}


def _put_back(item: _Aside) -> None:
    for path, tensor in item.originals.items():
        _put(item.module, path, tensor)
    item.originals.clear()  # what is replaced next may be another adapter's own bias


def _put(module: nn.Module, path: str, tensor: Any) -> Any:
    """Put a parameter, buffer or attribute into a module; returns the one that it replaces."""
    if not isinstance(tensor, Tensor):
        return set_attribute(module, path, tensor)
    if isinstance(tensor, Parameter):
        return put_at(module, path, tensor)
    owner, leaf = owner_of(module, path)
    before = owner._buffers[leaf]
    assert before is not None
    owner._buffers[leaf] = tensor.to(before.device, before.dtype)
    return before
