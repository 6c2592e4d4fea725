"""Putting an adapter that exists as a value on a model, once everything about it is known to fit."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.adapter import TOKEN_ROWS, Adapter, Factors
from lorica.config import LoraConfig, members
from lorica.errors import AdapterError, LoricaWarning, TargetError, lines, listing, nearest
from lorica.layers import AddedModule, Plan, SavedModule, layer_class
from lorica.layers.experts import is_transposed
from lorica.model import classes
from lorica.model.adaptable import (
    check_adaptable,
    check_bias,
    check_dropout,
    check_looked_up,
    check_magnitudes,
    check_whole,
)
from lorica.model.methods import plan_methods, trained_by
from lorica.model.mount import Mount, mount, open_for, parameter_for, uncollected
from lorica.model.renamed import adapter_now, swapped
from lorica.model.selection import ending_in, meant, outermost, outside, trained_whole, within_any
from lorica.model.stack import stacked
from lorica.model.starting import again, prepared, taken_out
from lorica.model.statistics import give_statistics, running
from lorica.model.structure import Place, Target, base_parameters, walk
from lorica.model.targets import as_target, parameter_targets
from lorica.model.tied import apart, pairs, torn, with_tied
from lorica.model.tokens import TokenTarget, starting_rows, token_targets
from lorica.model.values import trained_copies
from lorica.state import AdapterState

M = TypeVar("M", bound=nn.Module)


def attach(model: M, adapter: Adapter, name: str = "default", *, trainable: bool = False) -> M:
    """Put an adapter that exists as a value on a model, in place.

    The first adapter on a model acts at once; a later one waits for `active`.

    Args:
        model: the base, or a model that carries other adapters.
        adapter: its tensors are copied.
        name: to give it on this model.
        trainable: whether it may be trained further. Then a start that was taken out of W0 is so again.

    Returns:
        The same model.

    Raises:
        AdapterError: with the whole list of what is missing, unexpected or of another shape; the model is
            untouched.
        TargetError: a module that it trains whole cannot be; the model is untouched.
        StateError: an adapter is merged.
    """
    adapter.check_finite()
    return attach_finite(model, adapter, name, trainable=trainable)


def attach_finite(model: M, adapter: Adapter, name: str, *, trainable: bool) -> M:
    """As `attach`, for an adapter that is known to be finite: one that was just read is."""
    root, state = open_for(model, name, trainable=trainable)
    with uncollected(), stacked(root, state, adapter.config), state.base_in_place(root):
        _attach(root, state, adapter, name, trainable)
    if len(state.configs) == 1:
        state.activate(root, (name,))
    return model


def _attach(root: nn.Module, state: AdapterState, adapter: Adapter, name: str, trainable: bool) -> None:
    adapter = adapter_now(root, adapter)
    if isinstance(adapter.config, LoraConfig):
        # PEFT ties what is called embed_tokens or lm_head, and of others brings one table alone.
        brought = {*adapter.factors, *(name.rpartition(".")[0] for name in adapter.extras)}
        adapter = dataclasses.replace(adapter, config=with_tied(root, adapter.config, brought))
    places = {place.path: place for place in walk(root) if place.path}
    saved = outermost(ending_in(places.values(), adapter.config.modules_to_save or []))
    plan = plan_methods(root, adapter.config, saved)
    slots = _slots(root, adapter, saved)
    for path, module in saved.items():
        check_whole(path, module)
    lora, _ = members(adapter.config)
    dropout = lora.lora_dropout if lora else 0.0
    targets: list[Target] = []
    problems: list[str] = []
    try:
        named = parameter_targets(places.values(), lora) if lora else []
        parameters = {target.key: target for target in named}
        adapter = _as_stacked_now(parameters, adapter)
        check_looked_up(places.values(), {*adapter.factors, *saved})
        tokens = token_targets(root, lora, adapter.factors, saved)
    except TargetError as error:
        raise AdapterError(f"the adapter does not fit this {type(root).__name__}:\n  {error}") from None
    for path, factors in adapter.factors.items():
        try:
            if factors.kind == "parameter" and lora is not None:
                targets.append(_parameter_target(parameters, path, factors, lora))
            else:
                targets.append(_target(places, path, factors, drops=trainable and dropout > 0))
        except TargetError as error:
            problems.append(str(error))
    problems += [
        f"missing: {parameters[key].pattern_path}" for key in parameters if key not in adapter.factors
    ]
    problems += [*_extra_problems(root, adapter, saved, tokens), *_missing(root, places, adapter, saved)]
    problems += [*_added_problems(plan, adapter), *torn(root, lora, saved, adapter.extras)]
    if problems:
        raise AdapterError(f"the adapter does not fit this {type(root).__name__}:\n{lines(problems)}")
    starts: Mapping[str, tuple[Tensor, Tensor]] = {}
    if trainable and adapter.trained_as is not None:
        adapter, starts = adapter.without_starts()
    tied = _tied(root, lora, adapter)
    mounts, shared = [], [(target, tied[target.path]) for target in targets if target.path in tied]
    begun = [
        taken_out(target, *starts[path], factors.scale)
        if path in starts
        else again(target, adapter.config, prepared(root))
        for target, (path, factors) in zip(targets, adapter.factors.items(), strict=True)
    ]
    for target, factors, start in zip(targets, adapter.factors.values(), begun, strict=True):
        if target.path in tied:
            continue
        A, B = (parameter_for(target, factor, copy=True) for factor in (factors.A, factors.B))
        m = factors.magnitude
        magnitude = None if m is None else parameter_for(target, m, copy=True)
        b = factors.bias
        bias = None if b is None else parameter_for(target, b, copy=True)
        mounts.append(Mount(target, A, B, factors.scale, dropout, magnitude, bias, start))
    rows = [(table, starting_rows(table)) for table in tokens]
    mount(
        root,
        state,
        name,
        adapter.config,
        mounts,
        saved,
        slots,
        plan.parts,
        rows,
        shared,
        trainable=trainable,
    )
    give_statistics(root, state, name, saved, adapter.extras, trainable=trainable)
    classes.give(root, state, name)
    classes.take(state, name, adapter)
    with torch.no_grad():
        for copy in trained_copies(root, state, name):
            copy.tensor.copy_(adapter.extras[copy.base_name])
        for part in plan.parts:
            for key, tensor in part.tensors():
                tensor.copy_(adapter.added[key])
        for table, parameter in rows:
            parameter.copy_(adapter.extras[f"{table.path}.{TOKEN_ROWS}"])


def _tied(root: nn.Module, config: LoraConfig | None, adapter: Adapter) -> dict[str, str]:
    """The modules whose update is an embedding's, and that embedding's path."""
    layers = {path for path, factors in adapter.factors.items() if factors.kind != "parameter"}
    found = pairs(root, config, layers)
    different = apart(found, adapter.factors)
    if different:
        warnings.warn(
            f"ensure_weight_tying is set, but the adapter has other factors for {listing(different)} than "
            f"for {listing(found[path] for path in different)}, as PEFT makes them beside a 16-bit base; "
            "they are two updates here too, and merging unties the tables",
            LoricaWarning,
            stacklevel=5,
        )
    return {path: table for path, table in found.items() if path not in different}


def _as_stacked_now(parameters: Mapping[str, Target], adapter: Adapter) -> Adapter:
    """An adapter with factors of stacked experts as they are computed with now."""
    if adapter.stacks is None:
        return adapter
    factors = dict(adapter.factors)
    for path, target in parameters.items():
        weight = target.anchor
        if weight is None or weight.dim() != 3 or weight.shape[0] == 1 or path not in factors:
            continue
        if adapter.stacks == "turned" or not is_transposed(target.module):
            f = factors[path]
            A, B = swapped(f.A, f.B, weight.shape[0])
            factors[path] = dataclasses.replace(f, A=A, B=B)
    return dataclasses.replace(adapter, factors=factors, stacks=None)


def _parameter_target(
    parameters: Mapping[str, Target], key: str, factors: Factors, config: LoraConfig
) -> Target:
    """The parameter that an update is for.

    Raises:
        TargetError: there is none, or none that it fits.
    """
    target = parameters.get(key)
    if target is None:
        raise TargetError(f"unexpected: {key} is no parameter that target_parameters names in this model")
    expected = target.factor_shapes(config.rank(target.pattern_path))
    came = tuple(factors.A.shape), tuple(factors.B.shape)
    if came != expected:
        raise TargetError(
            f"shape of {target.pattern_path}: A {came[0]} and B {came[1]} in the adapter, {expected[0]} and "
            f"{expected[1]} in the model"
        )
    return target


def _slots(root: nn.Module, adapter: Adapter, saved: dict[str, nn.Module]) -> dict[str, Parameter]:
    """Single parameters that the adapter brings: the biases it trained, and whatever else differs.

    PEFT writes an adapted embedding's own table beside its factors; as a rule it is the base's, and there is
    nothing to replace.
    """
    if not adapter.extras:
        return {}
    have = base_parameters(root)
    trained = set(trained_by(root, adapter.config, adapter.factors, saved))
    own: dict[Parameter, Parameter] = {}
    slots = {}
    for path, tensor in adapter.extras.items():
        if path in have and have[path].shape == tensor.shape and not within_any(path, saved):
            base = have[path]
            copy = tensor.to(base, copy=True)
            if path in trained or not torch.equal(copy, base):
                slots[path] = own.setdefault(base, Parameter(copy))  # what is tied in the base stays tied
    for path in trained:
        if have[path] in own:
            slots.setdefault(path, own[have[path]])
    return slots


def _target(places: Mapping[str, Place], path: str, factors: Factors, *, drops: bool) -> Target:
    """The module that an update is for.

    Raises:
        TargetError: there is none, or none that it fits.
    """
    place = places.get(path)
    if place is None:
        raise TargetError(f"unexpected: {path} is not in the model{nearest(path, places, limit=1)}")
    layer = layer_class(place.module, place.parent)
    if layer is None or layer.kind != factors.kind or isinstance(place.module, SavedModule | AddedModule):
        raise TargetError(
            f"kind of {path}: {factors.kind} in the adapter, {type(place.module).__name__} in the model"
        )
    check_adaptable(place, layer)
    if drops:
        check_dropout(place, layer)
    if factors.magnitude is not None:
        check_magnitudes(place, layer)
    if factors.bias is not None:
        check_bias(place, layer)
    expected = layer.factor_shapes(place.module, factors.r)
    came = tuple(factors.A.shape), tuple(factors.B.shape)
    if came != expected:
        raise TargetError(
            f"shape of {path}: A {came[0]} and B {came[1]} in the adapter, {expected[0]} and "
            f"{expected[1]} in the model"
        )
    for part, vector in (("magnitude", factors.magnitude), ("bias", factors.bias)):
        if vector is not None and vector.shape != expected[1][:1]:
            raise TargetError(
                f"shape of {path}: {part} {tuple(vector.shape)} in the adapter, {expected[1][:1]} in "
                "the model"
            )
    return Target(path, place.module, layer)


def _extra_problems(
    root: nn.Module, adapter: Adapter, saved: dict[str, nn.Module], tokens: list[TokenTarget]
) -> Iterator[str]:
    rows = {f"{table.path}.{TOKEN_ROWS}": table.shape for table in tokens}
    yield from (f"missing: {name}" for name in rows if name not in adapter.extras)
    if not adapter.extras:
        return
    parameters: dict[str, Tensor] = {**base_parameters(root), **running(root, saved)}
    whole = {f"{path}.{leaf}": t for path, module in saved.items() for leaf, t in _state(module).items()}
    for path, tensor in adapter.extras.items():
        have: Tensor | None = (whole if within_any(path, saved) else parameters).get(path)
        shape = rows.get(path) if have is None else have.shape
        if shape is None:
            yield f"unexpected: {path} is not a parameter of the model{nearest(path, parameters, limit=1)}"
        elif shape != tensor.shape:
            yield f"shape of {path}: {tuple(tensor.shape)} in the adapter, {tuple(shape)} in the model"


def _missing(
    root: nn.Module, places: Mapping[str, Place], adapter: Adapter, saved: dict[str, nn.Module]
) -> Iterator[str]:
    """What the adapter's own configuration means in this model, and for which it brings nothing."""
    config, every = adapter.config, list(places.values())
    lora, _ = members(config)
    for path, module in saved.items():
        names = (f"{path}.{leaf}" for leaf in _state(module))
        yield from (f"missing: {name}" for name in names if name not in adapter.extras)
    trained = trained_by(root, config, adapter.factors, saved)
    # PEFT leaves out an attention's in_proj_bias, and whatever else is not called just "bias".
    have = base_parameters(root)
    given = {id(have[path]) for path in adapter.extras if path in have}
    named = (path for path in trained if not lora or path.rpartition(".")[2] == "bias")
    yield from (f"missing: {path}" for path in named if id(have[path]) not in given)
    # Another reader may have found other modules behind None, "all-linear" or a pattern; behind names there
    # is no doubt.
    if lora is not None and isinstance(lora.target_modules, list):
        try:
            wanted = meant(root, outside(every, trained_whole(every, lora)), lora)
            absent = [as_target(place, lora) for place in wanted if place.path not in adapter.factors]
        except TargetError:
            return  # a name the model lacks shows in the factors that have no place
        yield from (f"missing: {target.path}" for target in absent)


def _added_problems(plan: Plan, adapter: Adapter) -> Iterator[str]:
    expected = {key: tensor for part in plan.parts for key, tensor in part.tensors()}
    yield from (f"missing: {key}" for key in expected if key not in adapter.added)
    for key, tensor in adapter.added.items():
        if key not in expected:
            yield f"unexpected: {key}{nearest(key, expected, limit=1)}"
        elif expected[key].shape != tensor.shape:
            yield f"shape of {key}: {tuple(tensor.shape)} in the adapter, {tuple(expected[key].shape)} here"


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The module's own state, without the copies that other adapters have of it."""
    return module.base_state() if isinstance(module, SavedModule) else module.state_dict()
