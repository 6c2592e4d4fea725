"""A low-rank update of a layer: A and B, beside W0.

module ──start──▶ A, B (, magnitude, bias) ──put──▶ LoraLinear(LoraLayer, nn.Linear)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica import inits
from lorica.adapter import Adapter, Factors
from lorica.check import (
    check_adaptable,
    check_bias,
    check_dropout,
    check_magnitudes,
    layer_class,
)
from lorica.config import LoraConfig, matches_pattern
from lorica.errors import TargetError, nearest
from lorica.find import Target, as_target, means_all_linear, targeted
from lorica.inits import INITS, Residual, generator
from lorica.layers import LoraLayer, SavedModule, variants
from lorica.piece import Beginning, Contents, Held, Piece, Value
from lorica.pieces import Kind, Search, register
from lorica.state import AdapterState
from lorica.tree import Place, shortest_suffixes, tails, whole


class LowRank(Piece):
    """A and B on a layer, with DoRA's magnitude or the bias on B where there is one.

    Args:
        target: the module to adapt.
        factors: their first values, in the memory that they will keep.
        config: gives the dropout, and the variant of the layer's output.
        start: what is left of W0, which `lorica.pieces.plugins.residual` puts in its place; None for most.
    """

    section = "factors"
    called = True

    def __init__(
        self, target: Target, factors: Factors, config: LoraConfig, start: Residual | None = None
    ) -> None:
        self.path = target.key
        self.target, self.dropout = target, config.lora_dropout
        self.module = target.module if target.parameter is None else None
        self.start = start
        self.variant = None if config.variant is None else variants.of(config.variant)
        self.begun: Factors | None = factors

    @property
    def layer(self) -> LoraLayer:
        """The adapted layer that the piece is on."""
        assert isinstance(self.target.module, LoraLayer)
        return self.target.module

    def follow(self, paths: Mapping[nn.Module, str]) -> bool:  # noqa: D102
        path = paths.get(self.target.module)
        if path is not None and path != self.target.path:
            self.target = self.target._replace(path=path)
            self.path = self.target.key
        return path is not None

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:  # noqa: D102
        own, module = self.begun, self.target.module
        assert own is not None
        layer = module if isinstance(module, LoraLayer) else self.target.layer.take(module, state)
        A, B = Parameter(own.A, trainable), Parameter(own.B, trainable)
        layer.add_factors(name, A, B, own.scale, self.dropout)
        if own.magnitude is not None:
            layer.add_magnitude(name, Parameter(own.magnitude, trainable))
        if own.bias is not None:
            layer.add_bias(name, Parameter(own.bias, trainable))
        if self.variant is not None:
            layer.variants[name] = self.variant
        self.begun = None

    def off(self, root: nn.Module, name: str) -> None:  # noqa: D102
        layer = self.target.module
        if isinstance(layer, LoraLayer) and name in layer.scaling:
            layer.remove_factors(name)
            if not layer.scaling:
                layer.leave()

    def check_class(self) -> None:  # noqa: D102
        if isinstance(self.target.module, LoraLayer):
            self.target.module.check_own_class()

    def tensors(self, name: str) -> Iterator[Held]:  # noqa: D102
        at, own = self.target.path, self.begun
        if own is not None:
            A, B, magnitude, bias = own.A, own.B, own.magnitude, own.bias
        elif isinstance(self.target.module, LoraLayer) and name in self.layer.scaling:
            A, B = self.layer.factor_parameters(name)
            magnitude, bias = self.layer.magnitude_parameter(name), self.layer.bias_parameter(name)
        else:  # EVA gave this layer no rank
            return
        live_A, live_B = self.target.layer.factor_names(name)
        yield Held(f"{self.path} (A)", f"{at}.{live_A}", A)
        yield Held(f"{self.path} (B)", f"{at}.{live_B}", B)
        if magnitude is not None:
            live = f"{at}.lora_magnitude_vector.{name}.weight"
            yield Held(f"{self.path} (magnitude)", live, magnitude)
        if bias is not None:
            yield Held(f"{self.path} (bias)", f"{at}.lora_B.{name}.bias", bias)

    def give(self, name: str, contents: Contents, value: Value) -> None:  # noqa: D102
        parts = {held.key[len(self.path) :]: value(held.live, held.tensor) for held in self.tensors(name)}
        if parts:
            A, B, m, b = (parts.get(f" ({part})") for part in ("A", "B", "magnitude", "bias"))
            assert A is not None
            assert B is not None
            contents.factors[self.path] = Factors(A, B, self.scale(name), self.target.layer.kind, m, b)

    def begin_again(self, name: str, at: Beginning) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        lora, target = at.config.members()[0], self.target
        random = generator(at.seed, target.pattern_path)
        A, B = inits.of(lora).factors(target, lora, None, random)
        values = {"A": own(target, A), "B": own(target, B)}
        if lora.lora_bias:
            r, value = lora.rank(target.pattern_path), lora.init_lora_weights
            values["bias"] = own(target, inits.start_bias(B.shape[0], r, value, random))
        if lora.use_dora:
            W0 = whole(at.state.base_parameter(at.root, target.weight_path))
            A, B = values["A"].flatten(1), values["B"].flatten(1)
            values["magnitude"] = target.layer.row_norm(target.module, A, B, self.scale(name), W0)
        for held in self.tensors(name):
            yield held.tensor, values[held.key.rpartition("(")[2][:-1]]

    def scale(self, name: str) -> float:
        """The factor of its product B·A."""
        return self.layer.scaling[name] if self.begun is None else self.begun.scale

    def unlike(self, root: nn.Module, name: str, adapter: Adapter) -> Iterator[str]:
        """Another scale."""
        factors = adapter.factors.get(self.path)
        if factors is None:
            return
        ours = self.scale(name)
        if not math.isclose(factors.scale, ours, rel_tol=1e-6):
            yield f"scale of {self.path}: {factors.scale:g} in the adapter, {ours:g} on the model"


class LowRankUpdates(Kind):
    """Finds the modules that `target_modules` means, or those that a loaded adapter has factors for."""

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        lora = search.lora
        assert lora is not None
        if search.adapter is not None:
            return list(_brought(search, lora))
        if len(search.config.parts()) > 1:
            inits.check_alone(lora)
        targets = self.targets(search, lora)
        lora = lora.with_outputs(t.path for t in targets if isinstance(t.module, nn.MultiheadAttention))
        if lora is not search.lora:
            search.rename(lora)
        return [fresh(target, lora, search) for target in targets]

    def targets(self, search: Search, lora: LoraConfig) -> list[Target]:
        """The modules that a configuration adapts; records how a file should name them."""
        free = search.free
        targets = [as_target(place, lora) for place in targeted(search.root, free, lora)]
        names = lora.target_modules
        if names is None or means_all_linear(names):
            # The attention's name means its output too; PEFT would adapt one that is named beside it a second
            # time.
            outputs = {f"{t.path}.out_proj" for t in targets if isinstance(t.module, nn.MultiheadAttention)}
            paths = [target.path for target in targets if target.path not in outputs]
            names = shortest_suffixes(paths, [place.path for place in free])
        search.changes["target_modules"] = names
        search.changes["fan_in_fan_out"] = any(
            target.layer.transposed and target.layer.kind == "linear" for target in targets
        )
        return targets

    def finish(self, search: Search) -> None:  # noqa: D102
        targets, lora = search.targets, search.lora
        if lora is None or search.adapter is not None or not (lora.rank_pattern or lora.alpha_pattern):
            return
        paths = [target.pattern_path for target in targets]
        for name, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
            for key in patterns:
                if not any(matches_pattern(key, path) for path in paths):
                    raise TargetError(
                        f"{name} has {key!r}, which matches no adapted module{nearest(key, tails(paths))}"
                    )


def fresh(target: Target, config: LoraConfig, search: Search, piece: type[LowRank] = LowRank) -> LowRank:
    """A new piece for a module, its factors at their start.

    Raises:
        TargetError: the configuration's init is not possible on this module.
        StateError: the init needs data, and none was given.
    """
    value, r = config.init_lora_weights, config.rank(target.pattern_path)
    scale = config.scale(target.pattern_path)
    init = INITS.get(value) or inits.of(config)
    if search.dry:
        init.check(target, config)
        shapes = target.factor_shapes(r)
        A, B = (torch.empty(shape, device="meta") for shape in shapes)
        m = B.new_empty(len(B)) if config.use_dora else None
        b = B.new_empty(len(B)) if config.lora_bias else None
        return piece(target, Factors(A, B, scale, target.layer.kind, m, b), config)
    random = generator(search.seed, target.pattern_path)
    A, B, start = init.initialize(target, config, search.seen.get(target.path), random)
    A, B = own(target, A), own(target, B)
    magnitude = bias = None
    if config.use_dora:  # what leaves the weight as it is
        weight = None if start is None else start.weight
        magnitude = target.layer.row_norm(target.module, A.flatten(1), B.flatten(1), scale, weight)
    if config.lora_bias:
        bias = own(target, inits.start_bias(B.shape[0], r, value, random))
    return piece(target, Factors(A, B, scale, target.layer.kind, magnitude, bias), config, start)


def own(target: Target, factor: Tensor) -> Tensor:
    """A factor on the layer's device, in float32 or the layer's higher precision."""
    device, precision = target.computes()
    return factor.detach().to(device=device, dtype=precision).contiguous()


def blank(target: Target, factors: Factors, config: LoraConfig, piece: type[LowRank] = LowRank) -> LowRank:
    """A piece for a module, empty, with the shapes of an adapter's factors."""
    device, precision = target.computes()

    def room(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.empty(tensor.shape, dtype=precision, device=device)

    A, B, m, b = map(room, (factors.A, factors.B, factors.magnitude, factors.bias))
    assert A is not None
    assert B is not None
    return piece(target, Factors(A, B, factors.scale, factors.kind, m, b), config)


def _brought(search: Search, lora: LoraConfig) -> Iterator[LowRank]:
    """A piece for each module that the adapter has factors for; records those that do not fit."""
    adapter = search.adapter
    assert adapter is not None
    places = {place.path: place for place in search.places}
    for path, factors in adapter.factors.items():
        if factors.kind == "parameter":
            continue
        try:
            target = _target(places, path, factors, drops=search.trainable and lora.lora_dropout > 0)
            check_shapes(target.path, target.factor_shapes(factors.r), factors)
        except TargetError as error:
            search.reject(path, str(error))
        else:
            yield blank(target, factors, lora)
    # None, "all-linear" or a pattern may mean other modules to another reader; names mean the same to all.
    if isinstance(lora.target_modules, list):
        try:
            wanted = targeted(search.root, search.free, lora)
            absent = [as_target(place, lora) for place in wanted if place.path not in adapter.factors]
        except TargetError:
            return  # a name the model lacks shows in the factors that have no place
        search.missing += [target.path for target in absent]


def _target(places: Mapping[str, Place], path: str, factors: Factors, *, drops: bool) -> Target:
    """The module that factors belong to.

    Raises:
        TargetError: there is no such module, or they do not fit it.
    """
    place = places.get(path)
    if place is None:
        raise TargetError(f"unexpected: {path} is not in the model{nearest(path, places, limit=1)}")
    layer = layer_class(place.module, place.parent)
    if layer is None or layer.kind != factors.kind or isinstance(place.module, SavedModule):
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
    return Target(path, place.module, layer)


def check_shapes(name: str, expected: tuple[tuple[int, ...], tuple[int, ...]], factors: Factors) -> None:
    """Refuse factors whose shapes do not fit a module.

    Raises:
        TargetError: naming the module, the shapes that came and those expected.
    """
    came = tuple(factors.A.shape), tuple(factors.B.shape)
    if came != expected:
        raise TargetError(
            f"shape of {name}: A {came[0]} and B {came[1]} in the adapter, {expected[0]} and {expected[1]} "
            "in the model"
        )
    for part, vector in (("magnitude", factors.magnitude), ("bias", factors.bias)):
        if vector is not None and vector.shape != expected[1][:1]:
            raise TargetError(
                f"shape of {name}: {part} {tuple(vector.shape)} in the adapter, {expected[1][:1]} in the "
                "model"
            )


register(LowRankUpdates(), "lora")
