"""Find the modules that a configuration means; a name or pattern that matches none is an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.check import (
    ADAPTABLE,
    check_adaptable,
    check_bias,
    check_dropout,
    check_free,
    check_magnitudes,
    check_whole,
    layer_class,
)
from lorica.config import AdapterConfig, LoraConfig, full_match
from lorica.errors import LoricaWarning, TargetError, listing, nearest
from lorica.layers import LoraLayer, SavedModule
from lorica.tree import (
    Place,
    base_parameters,
    ending_in,
    model_type,
    outermost,
    output_head,
    tails,
    walk,
    within_any,
)

# The heads that a task puts on a pretrained model: new, so they are trained whole.
HEADS = {
    "SEQ_CLS": ("pre_classifier", "classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


# What `target_modules=None` means; `lorica.pieces.plugins.architectures` knows many.
BY_TYPE: dict[str, list[str] | str] = {}
"""`model_type` of a model's configuration → names, or a regular expression."""
QUERY_VALUE: list[tuple[str, ...]] = []
"""Names of query and value projections in other models, most specific first."""

NARROWING: dict[str, Callable[[list[Place], LoraConfig], list[Place]]] = {}
"""Field of a configuration → function that narrows the places that `target_modules` means."""


class Target(NamedTuple):
    """A module to adapt, and the kind of layer it becomes.

    Args:
        path: the module's path.
        module: the module.
        layer: the kind of adapted layer it becomes.
        parameter: the parameter to adapt, where it is not the layer's own weight.
        depth: number of adapted parameters that the module registered after this one.
    """

    path: str
    module: nn.Module
    layer: type[LoraLayer]
    parameter: str | None = None
    depth: int = 0

    @property
    def key(self) -> str:
        """The target's name in an adapter."""
        return self.path + ".base_layer" * self.depth

    @property
    def pattern_path(self) -> str:
        """The path that `rank_pattern` and `alpha_pattern` must match."""
        return self.path if self.parameter is None else f"{self.path}.{self.parameter}"

    @property
    def anchor(self) -> Tensor | None:
        """The tensor that decides the update's device and precision."""
        if self.parameter is not None:
            return self.module._parameters[self.parameter]
        return self.layer.anchor(self.module)

    def computes(self) -> tuple[torch.device | None, torch.dtype]:
        """Device and dtype of A and B: float32, or the layer's higher precision."""
        anchor = self.anchor
        if anchor is None:
            return None, torch.float32
        precise = anchor.is_floating_point()
        return anchor.device, torch.promote_types(anchor.dtype, torch.float32) if precise else torch.float32

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank `r`.

        Raises:
            TargetError: the module cannot carry an update of this rank.
        """
        layer: Any = self.layer
        if self.parameter is not None:
            return layer.shapes(self.module, self.parameter, r)
        return layer.factor_shapes(self.module, r)

    @property
    def weight_path(self) -> str:
        """Name of the adapted weight."""
        return f"{self.path}.{self.layer.weight_name}"


def targeted(root: nn.Module, places: list[Place], config: LoraConfig) -> list[Place]:
    """The places that `target_modules` means, without those that other fields exclude.

    Raises:
        TargetError: a name or pattern matches nothing, or nothing is left.
    """
    if config.target_modules in ([], ""):
        if not config.target_parameters:
            raise TargetError(
                "No `target_modules` passed but also no `target_parameters` found. Please check the values "
                "for these arguments."
            )
        return []
    if config.target_modules is None:
        chosen = _usual(root, places, config)
        if not chosen:
            return []
    elif means_all_linear(config.target_modules):
        chosen = all_linear(root, places)
    else:
        chosen = _match("target_modules", config.target_modules, places, _combined(config))
    for field, narrow in NARROWING.items():
        if getattr(config, field) is not None:
            chosen = narrow(chosen, config)
    named, chosen = chosen, _with_outputs(chosen, places)
    if config.exclude_modules:
        left_out = {p.path for p in _match("exclude_modules", config.exclude_modules, places)}
        # Excluding an attention excludes its output projection too, unless that is targeted by its own name.
        kept = _with_outputs([p for p in named if p.path not in left_out], places)
        kept = [p for p in kept if p.path not in left_out]
        if not kept:
            raise TargetError(
                f"All modules were excluded: no module is left to adapt, for exclude_modules="
                f"{config.exclude_modules!r} leaves out all that was targeted"
            )
        if len(kept) == len(chosen):
            warnings.warn(
                f"You have passed exclude_modules={config.exclude_modules!r} but no modules were excluded: "
                "none of these was targeted",
                LoricaWarning,
                stacklevel=2,
            )
        chosen = kept
    return chosen


def _with_outputs(chosen: list[Place], places: list[Place]) -> list[Place]:
    """An attention's output projection is a module of its own; naming the attention means both."""
    outputs = {f"{p.path}.out_proj" for p in chosen if isinstance(p.module, nn.MultiheadAttention)}
    if not outputs:
        return chosen
    return [*chosen, *(p for p in places if p.path in outputs and p not in chosen)]


def _combined(config: LoraConfig) -> str:
    """A hint at other fields that may have emptied the selection."""
    if not config.exclude_modules and not config.modules_to_save and config.task_type not in HEADS:
        return ""
    return (
        ". No modules were targeted for adaptation. This might be caused by a combination of target_modules "
        "with exclude_modules or modules_to_save"
    )


def matching(patterns: str | Collection[str], places: Iterable[Place]) -> list[Place]:
    """The places whose path a regular expression matches in full, or ends with one of the names."""
    if isinstance(patterns, str):
        return [place for place in places if full_match(patterns, place.path)]
    return ending_in(places, patterns)


def _match(name: str, patterns: list[str] | str, places: list[Place], more: str = "") -> list[Place]:
    hits = matching(patterns, places)
    if isinstance(patterns, str):
        if not hits:
            if ending_in(places, [patterns]):
                more = f"; one string is a regular expression of whole paths: give [{patterns!r}]{more}"
            else:
                more = hint(patterns, places) + more
            what = f"{name}={patterns!r} matches no module{more}"
            raise TargetError(_none_of(name, patterns) + what)
        return hits
    for pattern in patterns:
        if not ending_in(hits, [pattern]):
            what = f"{name} names {pattern!r}, which matches no module{hint(pattern, places)}{more}"
            raise TargetError(_none_of(name, [pattern]) + what)
    return hits


def _none_of(name: str, patterns: object) -> str:
    """PEFT's words for a `target_modules` that matches nothing."""
    return f"Target modules {patterns} not found in the base model: " if name == "target_modules" else ""


def _usual(root: nn.Module, places: list[Place], config: LoraConfig) -> list[Place]:
    told = BY_TYPE.get(model_type(root) or "")
    if told is not None and (hits := matching(told, places)):
        return hits
    for names in QUERY_VALUE:
        chosen = [p for p in places if p.path.rpartition(".")[2] in names and layer_class(p.module, p.parent)]
        if {p.path.rpartition(".")[2] for p in chosen} == set(names):
            return chosen
    chosen = [p for p in places if isinstance(p.module, nn.MultiheadAttention)]
    if not chosen and not config.target_parameters:
        raise TargetError(
            "Please specify `target_modules` or `target_parameters`: lorica knows no usual targets for "
            f'{type(root).__name__}. Or take "all-linear"{hint("", places)}'
        )
    return chosen


def all_linear(root: nn.Module, places: list[Place]) -> list[Place]:
    """Every linear layer but the output head."""
    head = output_head(root)
    chosen = [
        p
        for p in places
        if p.module is not head
        and not isinstance(p.module, SavedModule)
        and (layer := layer_class(p.module, p.parent)) is not None
        and layer.kind == "linear"
    ]
    if not chosen:
        raise TargetError(
            f'target_modules="all-linear", but {type(root).__name__} has no linear layer besides its head'
        )
    return chosen


def trained_whole(places: list[Place], config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` and `task_type` mean; of nested ones, the outermost.

    Raises:
        TargetError: the model lacks a name, or a module cannot be trained whole.
    """
    heads, names = HEADS.get(config.task_type or "", ()), config.modules_to_save or []
    found: list[Place] = []
    for name in dict.fromkeys([*names, *heads]):
        hits = ending_in(places, [name])
        # PEFT writes both "classifier" and "score" for a model that has one of them.
        if not hits and name not in heads:
            raise TargetError(
                f"modules_to_save names {name!r}, which the model does not have{hint(name, places)}"
            )
        found += hits
    for path, module, _ in found:
        if not isinstance(module, SavedModule):
            check_whole(path, module)
    return outermost(found)


def means_all_linear(pattern: object) -> bool:
    """Whether a value of `target_modules` is "all-linear", in upper or lower case."""
    return isinstance(pattern, str) and pattern.lower() == "all-linear"


def hint(name: str, places: list[Place]) -> str:
    """The end of an error message: the nearest name, and the model's adaptable modules."""
    adaptable = tails(p.path for p in places if layer_class(p.module, p.parent))
    everything = [*adaptable, *tails(p.path for p in places), *(p.path for p in places)]
    return f"{nearest(name, everything)}. The model's adaptable modules: {listing(adaptable) or 'none'}"


def as_target(place: Place, config: LoraConfig) -> Target:
    """The target that the module at a place becomes.

    Raises:
        TargetError: the module cannot be adapted.
    """
    path, module, parent = place
    check_free(path, module)
    layer = layer_class(module, parent)
    if layer is None:
        raise TargetError(
            f"{path} is a {type(module).__name__}, which cannot be adapted (lorica adapts "
            f"{ADAPTABLE}){_inside(path, module)}"
        )
    check_adaptable(place, layer)
    if config.use_dora:
        check_magnitudes(place, layer)
    if config.lora_bias:
        check_bias(place, layer)
    if config.lora_dropout:
        check_dropout(place, layer)
    return Target(path, module, layer)


def _inside(path: str, module: nn.Module) -> str:
    names = [p.path for p in walk(module) if p.path and layer_class(p.module, p.parent)]
    return f". Inside it are: {listing(f'{path}.{name}' for name in names)}" if names else ""


def all_biases(root: nn.Module, saved: Iterable[str]) -> Iterator[str]:
    """Names of the base's biases outside the modules that are trained whole."""
    saved = list(saved)
    for name in base_parameters(root):
        leaf = name.rpartition(".")[2]
        if (leaf == "bias" or leaf.endswith("_bias")) and not within_any(name, saved):
            yield name
