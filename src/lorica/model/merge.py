"""Adapters in the weights: merging, switching, and the base back bit for bit.

Merging never writes to W0. Each adapted weight's parameter is replaced by a new one that holds W0 +
scale·B·A, computed in float32 and rounded once; the original parameter is set aside untouched, and `restore`
puts that same object back. While merged, the model's classes, module tree and keys are the base's own, so it
runs, saves and compiles as the base does.

    merge     W0 ──set aside──▶      switch     W0 + s·B'·A' computed afresh      restore     W0 ◀──put back──
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.adapter import Adapter
from lorica.config import LoraConfig
from lorica.errors import AdapterError, StateError, listing
from lorica.functional import one_thread
from lorica.layers import LayerState, LoraLayer, SavedModule, SwappedModule
from lorica.layers.quantized import holding, set_attribute
from lorica.model import pretrained
from lorica.model.packed import (
    Into,
    Unpacked,
    check_into,
    packed_layers,
    plain_dtype,
    plain_weights,
    repack,
    unpack,
)
from lorica.model.structure import adapted, lora_layers, saved_modules
from lorica.roster import place

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class MergeReport:
    """What rounding cost.

    Args:
        names: adapters that were merged.
        layers: module path → ‖stored − (W0 + ΔW)‖ / ‖ΔW‖ (Frobenius): the share of the update that rounding
            to the weight's dtype took away or added. 0 is exact, 1 as good as all of it.
        untied: modules that shared a parameter, and now have one each.
    """

    names: tuple[str, ...]
    layers: dict[str, float]
    untied: list[str] = field(default_factory=list)

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost most, and its share."""
        return max(self.layers.items(), key=lambda item: item[1], default=("", 0.0))

    def __str__(self) -> str:
        """A line for each layer, the worst first."""
        merged = f"merged {listing(self.names)} into {len(self.layers)} layers"
        rows = sorted(self.layers.items(), key=lambda item: -item[1])
        tail = [f"no longer tied: {listing(self.untied)}"] if self.untied else []
        return "\n".join(
            [
                f"{merged}; share of each update lost to rounding:",
                *(f"  {loss:9.2e}  {path}" for path, loss in rows),
                *tail,
            ]
        )


@dataclass(eq=False)
class _Aside:
    """A module in its base form: what `SwappedModule.enter` needs, and what was replaced in it."""

    path: str
    module: nn.Module
    state: LayerState
    originals: dict[str, Any]
    merged: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Merged:
    """All that `restore` undoes.

    `ties` holds the names that share one parameter in the base; `copies` those that got a copy, and their
    original; `into` what became of packed weights, and `unpacked` the layers made plain for it.
    """

    before: tuple[str, ...]
    modules: list[_Aside]
    ties: list[list[str]]
    copies: dict[str, Parameter] = field(default_factory=dict)
    tie_config: Any = None
    into: Into | None = None
    unpacked: Unpacked | None = None


def merge(
    model: nn.Module, names: str | Iterable[str] | None = None, *, into: Into | None = None
) -> MergeReport:
    """Fold adapters into the weights, in place; the model then runs at the base's own speed.

    Args:
        model: adapted model.
        names: an adapter's name, or several, whose updates add up; None takes the active ones.
        into: what quantized layers become. ``"quantized"``: their weight is unpacked, updated and packed
            again with the same settings, which rounds much of the update away. ``"dequantized"``: every
            quantized layer of the model, adapted or not, becomes a plain `nn.Linear` in the dtype of the
            model's other parameters. Must be said where an update goes into a quantized layer; means nothing
            elsewhere.

    Returns:
        The loss to rounding, layer by layer.

    Raises:
        StateError: an adapter is merged already, none is active, a layer cannot take its update, or `into` is
            not said and must be. The model is untouched.
        ConfigError: `into` is neither of the two.
        AdapterError: no such adapter, or a merged weight would hold NaN or infinity. The model is untouched.

    Source: Hu et al., 2021, §4.1, "No additional inference latency".
    """
    root, roster = adapted(model)
    roster.check_unmerged("merge")
    chosen = roster.active if names is None else (names,) if isinstance(names, str) else tuple(names)
    if not chosen:
        raise StateError("no adapter is active; say which to merge")
    before = roster.active
    roster.activate(root, chosen)
    chosen = roster.active
    layers = lora_layers(root)
    try:
        for module in (*layers.values(), *saved_modules(root).values()):
            module.check_own_class()
        acting = {path: layer for path, layer in layers.items() if layer.acting()}
        packed = packed_layers(root)
        check_into(into, [path for path in acting if path in packed])
        plain = plain_dtype(root) if packed and into == "dequantized" else None
        with one_thread():
            merged = {
                path: _merged_state(path, layer, chosen, plain if path in packed else None)
                for path, layer in acting.items()
            }
        weights = plain_weights(packed, merged, plain) if plain is not None else {}
        losses = {path: _loss(layers[path], chosen, state) for path, state in merged.items()}
    except Exception:
        roster.activate(root, before)
        raise
    swapped: dict[str, SwappedModule] = {**layers, **saved_modules(root)}
    ties = _ties(root)
    states = {  # plain weights wait until the layers are in their base form
        path: {leaf: value for leaf, value in state.items() if path not in weights or leaf != "weight"}
        for path, state in merged.items()
    }
    aside = _Merged(
        before,
        [_set_aside(path, module, states.get(path, {}), chosen) for path, module in swapped.items()],
        ties,
        into=into if packed else None,
    )
    if weights:
        aside.unpacked = unpack(root, weights)
    untied = _untie(root, aside)
    pretrained.leave(root)
    roster.merged, roster.aside = chosen, aside
    return MergeReport(chosen, losses, untied)


def switch(model: nn.Module, name: str) -> None:
    """Exchange what is merged for another adapter, computed afresh from W0; merges it if nothing was merged.

    However often, W0 is never written to, so nothing drifts.

    Args:
        model: adapted model.
        name: of the adapter.

    Raises:
        StateError: a layer cannot take its update. What was merged stays so.
        AdapterError: no such adapter, or it holds NaN or infinity. What was merged stays so.
    """
    root, roster = adapted(model)
    roster.known(name)
    if not roster.merged:
        merge(model, name)
        return
    aside: _Merged = roster.aside
    if aside.into is not None:
        _exchange(model, name, roster.merged, aside.into)
        return
    for item in aside.modules:
        SwappedModule.enter(item.module, item.state)
    try:
        _check_mergeable(aside, roster.configs[name], name)
        _retie(root, aside)
        for item in aside.modules:
            _put_back(item)
        roster.activate(root, (name,))
        with one_thread():
            for item in aside.modules:
                if isinstance(item.module, LoraLayer):
                    _refill(item, item.module, name)
                else:
                    _show_copy(item, item.module, (name,))
    finally:
        for item in aside.modules:
            assert isinstance(item.module, SwappedModule)
            item.module.leave()
    _untie(root, aside)
    roster.merged = (name,)


def restore(model: M) -> M:
    """Undo `merge`: W0 comes back bit for bit, for it is the same memory.

    The adapters stand beside it again, and those act that did before.

    Args:
        model: merged model.

    Returns:
        The same model.

    Raises:
        StateError: nothing is merged.
    """
    root, roster = adapted(model)
    if not roster.merged:
        raise StateError("nothing is merged, so there is nothing to restore")
    aside: _Merged = roster.aside
    if aside.unpacked is not None:
        repack(root, aside.unpacked)
    for item in aside.modules:
        SwappedModule.enter(item.module, item.state)
        _put_back(item)
    _retie(root, aside)
    pretrained.enter(root)
    roster.merged, roster.aside = (), None
    roster.activate(root, aside.before)
    return model


def rounding_loss(layer: LoraLayer, names: Iterable[str], stored: Tensor, *, rows: int = 1024) -> float:
    """‖stored − (W0 + ΔW)‖ / ‖ΔW‖ in float64, a block of rows at a time.

    Args:
        layer: adapted layer that still holds W0.
        names: adapters whose updates make up ΔW.
        stored: what is to take W0's place, of W0's shape.
        rows: of a block; bounds the memory.
    """
    W = stored.detach().flatten(1)
    products = [
        (*layer.product(name, torch.float64), layer.scaling[name], layer.ratio(name, torch.float64))
        for name in names
        if name in layer.scaling
    ]
    lost = total = 0.0
    for i in range(0, W.shape[0], rows):
        part = slice(i, i + rows)
        base = layer.base_rows(part, torch.float64)
        delta = torch.zeros_like(base)
        for left, right, scale, ratio in products:
            update = scale * (left[part] @ right)
            if ratio is not None:
                ratio = layer.along_rows(ratio.detach())
                ratio = ratio if layer.transposed else ratio[part]
                update = ratio * (base + update) - base
            delta += update
        lost += float((W[part].double() - base - delta).square().sum())
        total += float(delta.square().sum())
    return (lost / total) ** 0.5 if total else 0.0


def _exchange(model: nn.Module, name: str, before: tuple[str, ...], into: Into) -> None:
    """`switch` where weights are packed: packing afresh leaves nothing of the old ones to fill again."""
    restore(model)
    try:
        merge(model, name, into=into)
    except Exception:
        merge(model, before, into=into)
        raise


def _merged_state(
    path: str, layer: LoraLayer, names: tuple[str, ...], plain: torch.dtype | None
) -> dict[str, Any]:
    """What the layer's base is to hold, by name; its weight unpacked, if a dtype for that is given."""
    state: dict[str, Any] = {}
    try:
        for leaf, part in layer.folded(names).items():
            if plain is not None and leaf == layer.weight_name:
                state[leaf] = Parameter(part.to(plain), requires_grad=False)
            else:
                state |= layer.storing(leaf, part)
            held = state[leaf] if type(state[leaf]) is Parameter else part
            if not torch.isfinite(held).all():
                raise AdapterError(
                    f"{path}: the merged {leaf} would hold NaN or infinity in {held.dtype}; the model "
                    "is left as it was"
                )
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    return state


def _loss(layer: LoraLayer, names: tuple[str, ...], state: dict[str, Any]) -> float:
    """`rounding_loss` of what `_merged_state` returned."""
    weight = state[layer.weight_name]
    if type(weight) is not Parameter:
        with holding(layer, state):
            weight = layer.base_rows(slice(None), layer.precision)
    return rounding_loss(layer, names, weight)


def _set_aside(path: str, module: SwappedModule, merged: dict[str, Any], names: tuple[str, ...]) -> _Aside:
    """Give a module its base form, holding what the adapters made of it."""
    item = _Aside(path, module, None, {}, merged)  # type: ignore[arg-type]
    for leaf, value in merged.items():
        item.originals[leaf] = _put(module, leaf, value)
    if isinstance(module, SavedModule):
        _show_copy(item, module, names)
    item.state = module.leave()
    return item


def _refill(item: _Aside, layer: LoraLayer, name: str) -> None:
    """Make the layer hold W0 with the update of `name`, or W0 itself where there is none."""
    if name not in layer.scaling:
        return
    targets = {leaf: parameter.detach() for leaf, parameter in item.merged.items()}
    for leaf, result in layer.folded((name,), out=targets).items():
        base = layer.get_base(leaf)
        if leaf not in item.merged:
            item.merged[leaf] = Parameter(torch.empty_like(base), requires_grad=False)
        target = item.merged[leaf].detach()
        if result.data_ptr() != target.data_ptr():
            target.copy_(result)
        item.originals[leaf] = base
        _put(layer, leaf, item.merged[leaf])


def _show_copy(item: _Aside, module: nn.Module, names: tuple[str, ...]) -> None:
    """Put the tensors of the named adapters' copy into the module itself."""
    assert isinstance(module, SavedModule)
    for name in names:
        if name in module.modules_to_save:
            for path, tensor in module.modules_to_save[name].state_dict(keep_vars=True).items():
                item.originals.setdefault(path, _put(module, path, tensor))


def _put_back(item: _Aside) -> None:
    for path, tensor in item.originals.items():
        _put(item.module, path, tensor)


def _put(module: nn.Module, path: str, tensor: Any) -> Any:
    """Put a parameter, buffer or attribute into a module; returns the one that was there."""
    if not isinstance(tensor, Tensor):
        return set_attribute(module, path, tensor)
    if isinstance(tensor, Parameter):
        return place(module, path, tensor)
    owner, _, leaf = path.rpartition(".")
    buffers = module.get_submodule(owner)._buffers
    before = buffers[leaf]
    assert before is not None
    buffers[leaf] = tensor
    return before


def _check_mergeable(aside: _Merged, config: LoraConfig, name: str) -> None:
    """Refuse an adapter that cannot be merged; the layers are in their adapted form."""
    factors = {}
    for path, module in ((item.path, item.module) for item in aside.modules):
        if isinstance(module, LoraLayer) and name in module.scaling:
            try:
                module.check_mergeable()
                module.check_bias((name,))
            except StateError as error:
                raise StateError(f"{path}: {error}") from None
            factors[path] = module.factors(name)
    Adapter(config, factors).check_finite()


def _ties(root: nn.Module) -> list[list[str]]:
    """The names under which one parameter stands, where there are several."""
    names: dict[Parameter, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _untie(root: nn.Module, aside: _Merged) -> list[str]:
    """Let a transformers model keep, when it is saved, what no longer is the same; returns those modules.

    A file that says "tied" would lose one of the weights that now differ, so it must not say that. And what
    is still the same must then be written under each of its names, for the reader will not tie it.
    """
    apart = [names for names in aside.ties if len({root.get_parameter(name) for name in names}) > 1]
    config = getattr(root, "config", None)
    if apart and getattr(config, "tie_word_embeddings", False):
        aside.tie_config, config.tie_word_embeddings = config, False  # type: ignore[union-attr]
        for names in aside.ties:
            held: set[Parameter] = set()
            for name in names:
                parameter = root.get_parameter(name)
                if parameter in held:
                    copy = Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    aside.copies[name] = place(root, name, copy)
                held.add(parameter)
    return list(dict.fromkeys(name.rpartition(".")[0] for names in apart for name in names))


def _retie(root: nn.Module, aside: _Merged) -> None:
    """Undo `_untie`."""
    for name, parameter in aside.copies.items():
        place(root, name, parameter)
    aside.copies.clear()
    if aside.tie_config is not None:
        aside.tie_config.tie_word_embeddings, aside.tie_config = True, None
