"""Low-rank updates of parameters that a module reads itself (`target_parameters`): stacked experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn import Parameter

from lorica.adapter import Adapter, Factors
from lorica.check import check_names, check_replaceable
from lorica.config import LoraConfig
from lorica.errors import AdapterError, TargetError, listing, nearest
from lorica.find import Target
from lorica.layers import LoraParameters, SwappedModule
from lorica.layers.plugins.experts import is_transposed
from lorica.piece import Held, Piece
from lorica.pieces import Kind, Search, register
from lorica.pieces.low_rank import LowRank, blank, check_shapes, fresh
from lorica.pieces.plugins.renamed import swapped
from lorica.state import AdapterState
from lorica.tree import Place, tails


class OnParameter(LowRank):
    """A and B of one parameter of a module."""

    called = False

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:  # noqa: D102
        own, module, parameter = self.begun, self.target.module, self.target.parameter
        assert own is not None
        assert parameter is not None
        host: Any = module if isinstance(module, LoraParameters) else LoraParameters.take(module, state)
        host.add_parameter(
            name, parameter, Parameter(own.A, trainable), Parameter(own.B, trainable), own.scale
        )
        self.begun = None

    def _update(self) -> Any:
        module: Any = self.target.module
        return module.lora_parameters[self.target.parameter]

    def tensors(self, name: str) -> Iterator[Held]:  # noqa: D102
        at, own = f"{self.target.path}.lora_parameters.{self.target.parameter}", self.begun
        A, B = self._update().factor_parameters(name) if own is None else (own.A, own.B)
        yield Held(f"{self.path} (A)", f"{at}.lora_A.{name}.weight", A)
        yield Held(f"{self.path} (B)", f"{at}.lora_B.{name}.weight", B)

    def scale(self, name: str) -> float:  # noqa: D102
        return self._update().scaling[name] if self.begun is None else self.begun.scale


class OnParameters(Kind):
    """Finds the parameters that `target_parameters` means."""

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        lora, adapter = search.lora, search.adapter
        assert lora is not None
        if adapter is None:
            _check_below(search.root, lora)
            targets = parameter_targets(search.free, lora)
            modules = {target.path for target in search.targets}
            both = sorted(modules & {target.path for target in targets})
            if both:
                first = next(target for target in targets if target.path in both)
                raise TargetError(
                    f"Trying to wrap an `nn.Parameter` of layer '{first.path}' of type "
                    f"{type(first.module).__name__}, which is not a valid target. {listing(both)}: targeted "
                    "as a module and by a parameter of it; leave one of the two out of target_modules and "
                    "target_parameters"
                )
            return [fresh(target, lora, search, OnParameter) for target in targets]
        targets_by_key = {target.key: target for target in _named(search, lora)}
        search.adapter = _as_stacked_now(targets_by_key, adapter)
        return list(_brought(search, lora, targets_by_key))

    def finish(self, search: Search) -> None:  # noqa: D102
        if search.adapter is not None and search.adapter.stacks is not None:
            search.adapter = dataclasses.replace(search.adapter, stacks=None)


def _named(search: Search, lora: LoraConfig) -> list[Target]:
    try:
        return parameter_targets(search.places, lora)
    except TargetError as error:
        raise AdapterError(
            f"the adapter does not fit this {type(search.root).__name__}:\n  {error}"
        ) from None


def _brought(search: Search, lora: LoraConfig, targets: Mapping[str, Target]) -> Iterator[LowRank]:
    assert search.adapter is not None
    for key, factors in search.adapter.factors.items():
        if factors.kind != "parameter":
            continue
        target = targets.get(key)
        if target is None:
            search.reject(
                key, f"unexpected: {key} is no parameter that target_parameters names in this model"
            )
            continue
        try:
            rank = lora.rank(target.pattern_path)
            check_shapes(target.pattern_path, target.factor_shapes(rank), factors)
        except TargetError as error:
            search.reject(key, str(error))
        else:
            yield blank(target, factors, lora, OnParameter)
    search.missing += [targets[key].pattern_path for key in targets if key not in search.adapter.factors]


def _as_stacked_now(targets: Mapping[str, Target], adapter: Adapter) -> Adapter:
    """An adapter with factors of stacked experts as they are computed with now."""
    if adapter.stacks is None:
        return adapter
    factors: dict[str, Factors] = dict(adapter.factors)
    for key, target in targets.items():
        weight = target.anchor
        if weight is None or weight.dim() != 3 or weight.shape[0] == 1 or key not in factors:
            continue
        if adapter.stacks == "turned" or not is_transposed(target.module):
            f = factors[key]
            A, B = swapped(f.A, f.B, weight.shape[0])
            factors[key] = dataclasses.replace(f, A=A, B=B)
    return dataclasses.replace(adapter, factors=factors, stacks=None)


def _check_below(root: nn.Module, config: LoraConfig) -> None:
    """Refuse a parameter of the model itself, which is no module of it that could change its class.

    Raises:
        TargetError: `target_parameters` names one.
    """
    for name in config.target_parameters or ():
        if name in root._parameters:
            raise TargetError(
                f"Targeting an nn.Parameter on the top-level module is not supported (parameter {name!r}). "
                "Put the model into a module of its own and adapt that"
            )


def parameter_targets(places: Iterable[Place], config: LoraConfig) -> list[Target]:
    """The parameters that `target_parameters` means.

    Raises:
        TargetError: a name matches none, or one that cannot be adapted.
    """
    wanted = config.target_parameters or []
    if not wanted:
        return []
    places = list(places)
    everything = [f"{p.path}.{leaf}" for p in places for leaf in p.module._parameters]
    for name in wanted:
        if not any(f".{path}".endswith(f".{name}") for path in everything):
            near = nearest(name, [*tails(everything), *everything])
            alone = (
                "No `target_modules` passed but also no `target_parameters` found. "
                if not config.target_modules
                else ""
            )
            raise TargetError(
                f"{alone}Please check the values for these arguments. "
                f"target_parameters names {name!r}, which matches no parameter{near}"
            )
    if config.layers_to_transform is not None:
        raise TargetError(
            "layers_to_transform chooses among target_modules only; put the blocks into the names of "
            'target_parameters instead: "layers.0.mlp.experts.down_proj"'
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise TargetError(
            f"init_lora_weights={config.init_lora_weights!r} is for layers; with target_parameters it must "
            'be True, False or "gaussian"'
        )
    targets = []
    ends = tuple(f".{name}" for name in wanted)
    for place in places:
        leaves = [leaf for leaf in place.module._parameters if f".{place.path}.{leaf}".endswith(ends)]
        for i, leaf in enumerate(leaves):
            _check_parameter(place, leaf)
            depth = len(leaves) - 1 - i
            targets.append(Target(place.path, place.module, LoraParameters, leaf, depth))
    return targets


def _check_parameter(place: Place, leaf: str) -> None:
    """Refuse a parameter on which an update would have no effect, or that is no matrix.

    Raises:
        TargetError: naming the parameter.
    """
    name, module = f"{place.path}.{leaf}", place.module
    check_replaceable(place.path, module)
    check_names(place, LoraParameters)
    if isinstance(module, SwappedModule) and not isinstance(module, LoraParameters):
        raise TargetError(
            f"{name}: another adapter has made {place.path} a {type(module).__name__}; adapt it as a module, "
            "or leave it out of target_parameters"
        )
    weight = module._parameters[leaf]
    if weight is None or not weight.is_floating_point() or weight.dim() not in (2, 3):
        what = "None" if weight is None else f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise TargetError(
            f"{name} is {what}; target_parameters takes floating-point matrices (d_out, d_in) and stacks of "
            "them (experts, ...)"
        )


register(OnParameters(), "target_parameters")
