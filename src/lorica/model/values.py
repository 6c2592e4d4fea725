"""Between a live adapter and an adapter as a value."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.adapter import TOKEN_ROWS, Adapter, Factors
from lorica.config import LoraConfig, changes_base, members
from lorica.errors import AdapterError, LoricaWarning, TargetError, lines
from lorica.layers import LoraLayer, tied_factors
from lorica.layers.added import join
from lorica.model.classes import names_of, take
from lorica.model.starting import less
from lorica.model.structure import (
    adapted,
    added_modules,
    base_parameters,
    lora_layers,
    saved_modules,
    token_modules,
)
from lorica.model.tokens import token_targets
from lorica.state import AdapterState, Start, as_uncompiled


def extract(
    model: nn.Module, name: str | None = None, *, state_dict: Mapping[str, Tensor] | None = None
) -> Adapter:
    """An adapter of a model as a value: an update of the base's own weights.

    It shares memory with the model, but where its start was taken out of W0: there the start stands beside
    it, with the other sign and for twice the rank. (LoftQ's base is no such difference; its factors come as
    they are.)

    Args:
        model: adapted model.
        name: of the adapter; None takes the only one, or the only active one.
        state_dict: take the values from here instead, by their live names, as sharded training gathers them.

    Returns:
        The adapter: factors by module path, and what is trained whole by its name in the base.

    Raises:
        AdapterError: no such adapter, or more than one to choose from.
        StateError: an adapter is merged, or none was ever put on.
    """
    root, state = adapted(model)
    live = as_trained(model, name, state_dict=state_dict)
    pairs = {
        path: (start.A, start.B)
        for path, layer in lora_layers(root).items()
        if (start := state.starts.get(state.one(name), {}).get(f"{path}.{layer.weight_name}"))
    }
    starts = {path: (A, B) for path, (A, B) in pairs.items() if A is not None and B is not None}
    return live.with_starts(starts) if starts else live


def as_trained(
    model: nn.Module, name: str | None = None, *, state_dict: Mapping[str, Tensor] | None = None
) -> Adapter:
    """As `extract`, but always the live tensors: factors that may belong beside another weight than W0."""
    root, state = adapted(model)
    name = state.one(name)
    state.check_unmerged("take an adapter out")
    gathered = state_dict or {}
    if any(as_uncompiled(key) != key for key in gathered):
        gathered = {as_uncompiled(key): tensor for key, tensor in gathered.items()}

    def value(path: str, tensor: Tensor) -> Tensor:
        return gathered.get(path, tensor).detach()

    factors = {}
    held = (
        (f"{path}{key}", f"{path}{live}", holder)
        for path, layer in lora_layers(root).items()
        if name in layer.scaling
        for key, live, holder in layer.holders(name)
    )
    for key, path, layer in held:
        named = zip(layer.factor_names(name), layer.factor_parameters(name), strict=True)
        A, B = (value(f"{path}.{leaf}", parameter) for leaf, parameter in named)
        if (shared := tied_factors(layer, name)) is not None:
            A, B = (value(f"{path}.{leaf}", parameter).t() for leaf, parameter in shared.items())
        magnitude = layer.magnitude_parameter(name)
        if magnitude is not None:
            magnitude = value(f"{path}.lora_magnitude_vector.{name}.weight", magnitude)
        bias = layer.bias_parameter(name)
        if bias is not None:
            bias = value(f"{path}.lora_B.{name}.bias", bias)
        factors[key] = Factors(A, B, layer.scaling[name], layer.kind, magnitude, bias)
    extras = {
        copy.base_name: value(copy.live_name, copy.tensor) for copy in trained_copies(root, state, name)
    }
    for path, module in token_modules(root).items():
        own = module.token_adapter
        if name in own.indices and name not in own.tied:
            rows = own.trainable_tokens_delta[name]
            extras[f"{path}.{TOKEN_ROWS}"] = value(f"{path}.{TOKEN_ROWS}.{name}", rows)
    in_place, config = name in state.active, state.configs[name]
    written: set[Parameter] = set()
    for path, parameter in state.slots.get(name, {}).items():
        # PEFT looks for what is tied under each of its names; elsewhere one is enough.
        if isinstance(config, LoraConfig) or parameter not in written:
            extras[path] = value(path, parameter) if in_place else parameter.detach()
        written.add(parameter)
    extras |= {
        path: value(path, buffer) if in_place else buffer for path, buffer in state.moved(root, name).items()
    }
    added = {}
    for path, host in added_modules(root).items():
        if name in host.parts:
            place = join(path, host.own_modules[0])
            for leaf, parameter in host.parts[name].named_parameters():
                added[f"{place}.{leaf}"] = value(f"{place}.{name}.{leaf}", parameter)
    return Adapter(config, factors, extras, added, classes=names_of(root, state, name, extras))


def overwrite(model: nn.Module, adapter: Adapter, name: str | None = None, *, strict: bool = True) -> None:
    """Give an adapter that is already on the model the values of another of the same make.

    Nothing else changes: not which adapter acts, not what trains, not the training mode.

    Args:
        model: adapted model.
        adapter: the values to take.
        name: of the adapter on the model; None takes the only one, or the only active one.
        strict: whether other scales, tokens or starts are an error too, and not just a warning.

    Raises:
        AdapterError: with the whole list of what is missing, unexpected, of another shape or means something
            else; the model is untouched.
        StateError: an adapter is merged, or none was ever put on.

    Warns:
        LoricaWarning: unless `strict`, with the list of what means something else here.
    """
    fitting(model, adapter, name, strict=strict)()


def fitting(
    model: nn.Module, adapter: Adapter, name: str | None = None, *, strict: bool = True
) -> Callable[[], None]:
    """`overwrite` in two steps: what can fail is done here, and what is returned writes the values."""
    root, state = adapted(model)
    adapter.check_finite()
    if adapter.stacks is not None:
        raise AdapterError(
            "these factors of stacked experts are as an older PEFT computed with them; lorica.load the "
            "adapter on its base"
        )
    name = state.one(name)
    own, starts, given = state.starts.get(name, {}), {}, adapter
    if any(start.A is not None for start in own.values()):
        config = state.configs[name]
        assert isinstance(config, LoraConfig)
        if all(f.r == 2 * config.rank(path) for path, f in adapter.factors.items()):
            # A file that went through other hands no longer says how it trained, but its form does.
            adapter = dataclasses.replace(adapter, trained_as=adapter.trained_as or config)
        if adapter.trained_as is not None:
            adapter, starts = adapter.without_starts()
    there = as_trained(model, name)
    adapter, there, moved = _statistics(root, state, name, adapter, there)
    live, new = there.named_tensors(), _without_tables(adapter, there, root).named_tensors()
    problems = [f"missing: {key}" for key in live if key not in new]
    problems += [f"unexpected: {key}" for key in new if key not in live]
    problems += [
        f"shape of {key}: {tuple(new[key].shape)} in the adapter, {tuple(live[key].shape)} on the model"
        for key in live
        if key in new and live[key].shape != new[key].shape
    ]
    problems = problems or _torn(live, new)
    unlike = [*_scales(there, given), *_tokens(root, name, adapter), *_base(there, adapter, starts)]
    if problems or (unlike and strict):
        raise AdapterError(f"the adapter does not fit the one on the model:\n{lines([*problems, *unlike])}")
    if unlike:
        warnings.warn(
            f"the values come from an adapter of another make than the one on the model:\n{lines(unlike)}",
            LoricaWarning,
            stacklevel=4,
        )

    @torch.no_grad()
    def write() -> None:
        take(state, name, given)
        for key, tensor in live.items():
            tensor.copy_(new[key])
        for path, buffer in state.live_statistics(root, name).items():
            buffer.copy_(moved.get(path, state.base_tensor(root, path)))
        for path, layer in lora_layers(root).items():
            if path in starts:
                path_of_weight = f"{path}.{layer.weight_name}"
                weight = state.base_parameter(root, path_of_weight)
                _restart(own[path_of_weight], layer, weight, *starts[path], layer.scaling[name])

    return write


def _statistics(
    root: nn.Module, state: AdapterState, name: str, adapter: Adapter, there: Adapter
) -> tuple[Adapter, Adapter, dict[str, Tensor]]:
    """Both adapters without running statistics, and those of the first: what is not there is the base's."""
    own = state.statistics.get(name, {})
    moved = {path: tensor for path, tensor in adapter.extras.items() if path in own}
    if any(tensor.shape != own[path].shape for path, tensor in moved.items()):
        return adapter, there, {}

    def bare(one: Adapter) -> Adapter:
        extras = {path: tensor for path, tensor in one.extras.items() if path not in own}
        return dataclasses.replace(one, extras=extras)

    return (bare(adapter), bare(there), moved) if own else (adapter, there, moved)


def _without_tables(adapter: Adapter, there: Adapter, root: nn.Module) -> Adapter:
    """An adapter without the tables of a resized vocabulary that a file brings beside what trained.

    Args:
        adapter: as read.
        there: the adapter on the model.
        root: the model; tables that are not its own stay.
    """
    if adapter.extras.keys() <= there.extras.keys():
        return adapter
    base = base_parameters(root)
    kept = {
        name: tensor
        for name, tensor in adapter.extras.items()
        if name in there.extras or name not in base or not torch.equal(tensor.to(base[name]), base[name])
    }
    return dataclasses.replace(adapter, extras=kept)


def _scales(there: Adapter, adapter: Adapter) -> Iterator[str]:
    """Updates that are multiplied by another number in the adapter."""
    for path, factors in adapter.factors.items():
        ours = there.factors[path].scale if path in there.factors else factors.scale
        if not math.isclose(factors.scale, ours, rel_tol=1e-6):
            yield f"scale of {path}: {factors.scale:g} in the adapter, {ours:g} on the model"


def _tokens(root: nn.Module, name: str, adapter: Adapter) -> Iterator[str]:
    """Tables whose rows are other tokens' in the adapter."""
    lora, _ = members(adapter.config)
    try:
        theirs = {table.path: table.indices for table in token_targets(root, lora, (), ())}
    except TargetError as error:
        yield str(error)
        return
    for path, module in token_modules(root).items():
        ours = module.token_adapter.indices.get(name)
        if path in theirs and ours is not None and theirs[path] != ours:
            yield f"tokens of {path}: {[*theirs[path]]} in the adapter, {[*ours]} on the model"


def _base(there: Adapter, adapter: Adapter, starts: Mapping[str, object]) -> Iterator[str]:
    """Factors that stand beside another weight than the model's own, and bring no start to make it from."""
    ours, theirs = (
        a.config.init_lora_weights if isinstance(a.config, LoraConfig) else True for a in (there, adapter)
    )
    if ours != theirs and (changes_base(ours) or changes_base(theirs)) and not starts:
        yield f"init_lora_weights: {theirs!r} in the adapter, {ours!r} on the model; each means another base"


def _torn(live: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[str]:
    """What is wrong where two names stand for one tensor, and other values are given for each."""
    first: dict[int, str] = {}
    problems = []
    for key, tensor in live.items():
        other = first.setdefault(tensor.data_ptr(), key)
        value = new[other] if _laid_out_alike(live[other], tensor) else new[other].mT
        if other != key and tensor.numel() and not torch.equal(new[key], value):
            problems.append(f"{key} and {other} are one on the model, and differ in the adapter")
    return problems


def _laid_out_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two names of the same memory are the same tensor, and not each other's transpose."""
    # Strides tell in squares alone: along a single row or column they mean nothing.
    square = one.ndim == 2 and one.shape[0] == one.shape[1]
    return one.shape == other.shape and (not square or one.stride() == other.stride())


def _restart(start: Start, layer: LoraLayer, W0: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """Make a start one that was saved: the decomposition that it came from may differ on another machine."""
    assert start.A is not None
    assert start.B is not None
    start.A.copy_(A)
    start.B.copy_(B)
    rest = less(type(layer), W0, start.A, start.B, scale)
    start.weight.copy_(rest.t() if layer.transposed else rest)


class TrainedCopy(NamedTuple):
    """A tensor of a module trained whole: its name in the base, its live name, and the tensor itself."""

    base_name: str
    live_name: str
    tensor: Tensor


def trained_copies(root: nn.Module, state: AdapterState, name: str) -> Iterator[TrainedCopy]:
    """All tensors, buffers too, of the copies that an adapter has of whole modules."""
    if name not in state.whole:
        return
    for path, module in saved_modules(root).items():
        if name in module.modules_to_save:
            for leaf, tensor in module.modules_to_save[name].state_dict(keep_vars=True).items():
                yield TrainedCopy(f"{path}.{leaf}", f"{path}.modules_to_save.{name}.{leaf}", tensor)
