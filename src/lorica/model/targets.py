"""What a configuration means on a model: modules to adapt, parameters of modules, biases to train."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

from torch import nn

from lorica.config import LoraConfig, matches_pattern
from lorica.errors import TargetError, listing, nearest
from lorica.layers import (
    ADAPTABLE,
    AddedModule,
    LoraAttention,
    LoraConv1D,
    LoraParameters,
    SavedModule,
    layer_class,
)
from lorica.model.adaptable import (
    check_adaptable,
    check_bias,
    check_dropout,
    check_looked_up,
    check_magnitudes,
    check_parameter,
)
from lorica.model.renamed import config_now
from lorica.model.selection import (
    HEADS,
    means_all_linear,
    meant,
    outside,
    shortest_suffixes,
    tails,
    trained_whole,
    within_any,
)
from lorica.model.structure import Place, Target, base_parameters, walk
from lorica.model.tied import with_tied


class Targets(NamedTuple):
    """What a configuration means on a model, and the configuration with that written into it."""

    layers: list[Target]
    saved: dict[str, nn.Module]
    config: LoraConfig


def resolve(root: nn.Module, config: LoraConfig) -> Targets:
    """Find the modules that a configuration adapts and those that it trains whole.

    Args:
        root: the model.
        config: what to look for.

    Returns:
        The modules, and the configuration with `target_modules`, `modules_to_save`, `fan_in_fan_out` and
        `base_model_name_or_path` as they turned out.

    Raises:
        TargetError: a name or pattern matches nothing, or something that cannot be adapted.
    """
    config = with_tied(root, config_now(root, config))
    places = [place for place in walk(root) if place.path]
    saved = trained_whole(places, config)
    free = outside(places, saved)
    targets = [as_target(place, config) for place in meant(root, free, config)]
    _check_below(root, config)
    targets += parameter_targets(free, config)
    both = {t.path for t in targets if t.parameter is None} & {t.path for t in targets if t.parameter}
    if both:
        first = next(t for t in targets if t.path in both)
        kind = type(first.module).__name__
        raise TargetError(
            f"Trying to wrap an `nn.Parameter` of layer '{first.path}' of type {kind}, which is not a valid "
            f"target. {listing(sorted(both))}: targeted as a module and by a parameter of it; leave one of "
            "the two out of target_modules and target_parameters"
        )
    check_looked_up(places, {*saved, *(target.path for target in targets)})
    paths = [target.pattern_path for target in targets]
    for name, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if not any(matches_pattern(key, path) for path in paths):
                raise TargetError(
                    f"{name} has {key!r}, which matches no adapted module{nearest(key, tails(paths))}"
                )
    return Targets(targets, saved, _settled(root, config, [p.path for p in free], targets, saved))


def _settled(
    root: nn.Module,
    config: LoraConfig,
    paths: list[str],
    targets: list[Target],
    saved: dict[str, nn.Module],
) -> LoraConfig:
    """The configuration as a file should hold it: every reader finds the same modules by it."""
    names = config.target_modules
    if names is None or means_all_linear(names):
        # The attention's name means its output too; PEFT would adapt one that is named beside it a second
        # time.
        outputs = {f"{t.path}.out_proj" for t in targets if issubclass(t.layer, LoraAttention)}
        modules = [t.path for t in targets if t.parameter is None and t.path not in outputs]
        names = shortest_suffixes(modules, paths)
    heads = sorted({path.rpartition(".")[2] for path in saved}) if config.task_type in HEADS else None
    return config.replace(
        target_modules=names,
        modules_to_save=list(dict.fromkeys([*(config.modules_to_save or []), *(heads or [])])) or None,
        fan_in_fan_out=any(issubclass(t.layer, LoraConv1D) for t in targets),
        base_model_name_or_path=getattr(root, "name_or_path", None) or config.base_model_name_or_path or None,
    )


def as_target(place: Place, config: LoraConfig) -> Target:
    """What the module at a place becomes.

    Raises:
        TargetError: it cannot be adapted so.
    """
    path, module, parent = place
    if isinstance(module, AddedModule):
        raise TargetError(
            f"{path} carries a part that another method added ({type(module).swapped_by.__name__}) and "
            "cannot take a low-rank update beside that; leave it out"
        )
    if isinstance(module, SavedModule):
        raise TargetError(
            f"{path} is trained whole by another adapter (modules_to_save) and cannot take a "
            "low-rank update beside that"
        )
    layer = layer_class(module, parent)
    if layer is None:
        raise TargetError(
            f"{path} is a {type(module).__name__}, which cannot be adapted (lorica adapts "
            f"{ADAPTABLE}){_inside(path, module)}"
        )
    if layer is LoraParameters:
        raise TargetError(
            f"{path}: another adapter adapts parameters of it (target_parameters), so it cannot take an "
            "update of its own weight beside that; target its parameter"
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
            check_parameter(place, leaf)
            targets.append(Target(place.path, place.module, LoraParameters, leaf, len(leaves) - 1 - i))
    return targets


def biases(
    root: nn.Module, config: LoraConfig, adapted: Container[str], saved: Iterable[str]
) -> Iterator[str]:
    """Names of the base's biases that a LoRA configuration trains.

    Args:
        root: the model.
        config: its `bias` says which.
        adapted: paths of the modules with an update.
        saved: paths of the modules trained whole, whose biases train with them.
    """
    if config.bias == "none":
        return
    for name in all_biases(root, saved):
        if config.bias == "all" or name.rpartition(".")[0] in adapted:
            yield name


def all_biases(root: nn.Module, saved: Iterable[str]) -> Iterator[str]:
    """Names of the base's biases outside the modules trained whole."""
    saved = list(saved)
    for name in base_parameters(root):
        leaf = name.rpartition(".")[2]
        if (leaf == "bias" or leaf.endswith("_bias")) and not within_any(name, saved):
            yield name
