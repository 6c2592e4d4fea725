"""From a configuration's patterns to the modules they mean; a pattern that means none is an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from lorica.config import AdapterConfig, LoraConfig, matches_pattern
from lorica.errors import TargetError, listing, nearest
from lorica.layers import (
    ADAPTABLE,
    AddedModule,
    LoraAttention,
    LoraConv1D,
    LoraEmbedding,
    LoraLayer,
    LoraParameters,
    SavedModule,
    layer_class,
)
from lorica.layers.conv import LoraConv
from lorica.model.adaptable import (
    check_adaptable,
    check_bias,
    check_looked_up,
    check_magnitudes,
    check_parameter,
    check_whole,
)
from lorica.model.structure import Place, base_parameters, walk

# Query and value projections as the architectures name them, most specific first: the usual choice where none
# is given.
_QUERY_VALUE: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, OPT, BART, Whisper, CLIP
    ("query", "value"),  # BERT, RoBERTa, ELECTRA, ViT
    ("query_proj", "value_proj"),  # DeBERTa-v2
    ("q_lin", "v_lin"),  # DistilBERT
    ("q", "v"),  # T5
    ("to_q", "to_v"),  # diffusion models
    ("query_key_value",),  # GPT-NeoX, Falcon, BLOOM
    ("qkv_proj",),  # Phi-3
    ("c_attn",),  # GPT-2
    ("Wqkv",),  # ModernBERT, MPT
    ("qkv",),
)
# The heads that a task puts on a pretrained model, new and so to be trained whole.
HEADS = {
    "SEQ_CLS": ("pre_classifier", "classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class Target(NamedTuple):
    """A module to adapt, and the kind of layer it becomes.

    Args:
        path: of the module.
        module: itself.
        layer: what it becomes.
        parameter: which of its parameters, where that is not the kind's own.
        depth: how many parameters of the module that are adapted too it registered later.
    """

    path: str
    module: nn.Module
    layer: type[LoraLayer]
    parameter: str | None = None
    depth: int = 0

    @property
    def key(self) -> str:
        """Its name in an adapter."""
        return self.path + ".base_layer" * self.depth

    @property
    def pattern_path(self) -> str:
        """What `rank_pattern` and `alpha_pattern` are matched against."""
        return self.path if self.parameter is None else f"{self.path}.{self.parameter}"

    @property
    def anchor(self) -> Tensor | None:
        """The tensor that says on which device the update computes, and how precisely."""
        if self.parameter is not None:
            return self.module._parameters[self.parameter]
        return self.layer.anchor(self.module)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank `r`.

        Raises:
            TargetError: the module cannot carry such an update.
        """
        if self.parameter is not None:
            return LoraParameters.shapes(self.module, self.parameter, r)
        return self.layer.factor_shapes(self.module, r)

    @property
    def weight_path(self) -> str:
        """Name of the weight that the update belongs to."""
        return f"{self.path}.{self.layer.weight_name}"


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
    places = [place for place in walk(root) if place.path]
    saved = trained_whole(places, config)
    free = outside(places, saved)
    targets = [as_target(place, config) for place in meant(root, free, config)]
    targets += parameter_targets(free, config)
    both = {t.path for t in targets if t.parameter is None} & {t.path for t in targets if t.parameter}
    if both:
        raise TargetError(
            f"{listing(sorted(both))}: targeted as a module and by a parameter of it; leave one of the two "
            "out of target_modules and target_parameters"
        )
    check_looked_up(places, {*saved, *(target.path for target in targets)})
    paths = [target.pattern_path for target in targets]
    for name, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if not any(matches_pattern(key, path) for path in paths):
                raise TargetError(
                    f"{name} has {key!r}, which matches no adapted module{nearest(key, _tails(paths))}"
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
    if names is None or _means_all_linear(names):
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


def shortest_suffixes(chosen: Iterable[str], everything: Iterable[str]) -> list[str]:
    """The shortest dotted suffixes that match all chosen paths and no other."""
    chosen = list(chosen)
    available = Counter(suffix for path in everything for suffix in _suffixes(path))
    wanted = Counter(suffix for path in chosen for suffix in _suffixes(path))
    # The whole path is the last resort: it is unambiguous unless another path ends with it.
    return sorted({next((s for s in _suffixes(path) if wanted[s] == available[s]), path) for path in chosen})


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def _tails(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


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
            near = nearest(name, [*_tails(everything), *everything])
            raise TargetError(f"target_parameters names {name!r}, which matches no parameter{near}")
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


def _means_all_linear(pattern: object) -> bool:
    return isinstance(pattern, str) and pattern.lower() == "all-linear"


def ending_in(places: Iterable[Place], names: Iterable[str]) -> list[Place]:
    """The places of which a name is the path, or its end from a dot on."""
    ends = tuple(f".{name}" for name in names)
    return [place for place in places if f".{place.path}".endswith(ends)]


def within_any(path: str, outer: Iterable[str]) -> bool:
    """Whether `path` is one of the given paths, or inside one."""
    return any(path == o or path.startswith(f"{o}.") for o in outer)


def outside(places: list[Place], outer: Collection[str]) -> list[Place]:
    """The places that are none of the given paths and inside none."""
    return [place for place in places if not within_any(place.path, outer)] if outer else places


def outermost(places: Iterable[Place]) -> dict[str, nn.Module]:
    """Path → module, without those that are inside another."""
    found = {place.path: place.module for place in places}
    return {path: module for path, module in found.items() if not within_any(path, found.keys() - {path})}


def trained_whole(places: list[Place], config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` and `task_type` mean, the outermost where they are nested.

    Raises:
        TargetError: a name that the model lacks, or a module that cannot be trained whole.
    """
    heads, names = HEADS.get(config.task_type or "", ()), config.modules_to_save or []
    found: list[Place] = []
    for name in dict.fromkeys([*names, *heads]):
        hits = ending_in(places, [name])
        # PEFT writes both "classifier" and "score" for a model that has one of them.
        if not hits and name not in heads:
            raise TargetError(
                f"modules_to_save names {name!r}, which the model does not have{_hint(name, places)}"
            )
        found += hits
    for path, module, _ in found:
        if isinstance(module, SavedModule):
            continue
        check_whole(path, module)
        inside = [p for p in places if within_any(p.path, [path])]
        adapted = [p.path for p in inside if isinstance(p.module, LoraLayer | AddedModule)]
        if adapted:
            raise TargetError(
                f"{path} cannot be trained whole: another adapter has its updates in {listing(adapted)}"
            )
    return outermost(found)


def meant(root: nn.Module, places: list[Place], config: LoraConfig) -> list[Place]:
    """The places that `target_modules` means, less those that other fields leave out.

    Raises:
        TargetError: a name or pattern matches nothing, or nothing is left.
    """
    if config.target_modules == []:
        return []
    if config.target_modules is None:
        chosen = _usual(root, places)
    elif _means_all_linear(config.target_modules):
        chosen = _all_linear(root, places)
    else:
        chosen = _match("target_modules", config.target_modules, places)
    if config.layers_to_transform is not None:
        chosen = _in_blocks(chosen, config)
    chosen = _with_outputs(chosen, places)
    if config.exclude_modules:
        left_out = {p.path for p in _match("exclude_modules", config.exclude_modules, places)}
        chosen = [p for p in chosen if p.path not in left_out]
    if not chosen:
        raise TargetError(
            f"no module is left to adapt: exclude_modules={config.exclude_modules!r} leaves out "
            "all that was targeted"
        )
    return chosen


def _with_outputs(chosen: list[Place], places: list[Place]) -> list[Place]:
    """An attention's output projection is a module of its own; naming the attention means both."""
    outputs = {f"{p.path}.out_proj" for p in chosen if isinstance(p.module, nn.MultiheadAttention)}
    if not outputs:
        return chosen
    return [*chosen, *(p for p in places if p.path in outputs and p not in chosen)]


def _match(name: str, patterns: list[str] | str, places: list[Place]) -> list[Place]:
    if isinstance(patterns, str):
        hits = [p for p in places if re.fullmatch(patterns, p.path)]
        if not hits:
            raise TargetError(f"{name}={patterns!r} matches no module{_hint(patterns, places)}")
        return hits
    hits = ending_in(places, patterns)
    for pattern in patterns:
        if not ending_in(hits, [pattern]):
            raise TargetError(f"{name} names {pattern!r}, which matches no module{_hint(pattern, places)}")
    return hits


def _hint(name: str, places: list[Place]) -> str:
    adaptable = _tails(p.path for p in places if layer_class(p.module, p.parent))
    everything = [*adaptable, *_tails(p.path for p in places), *(p.path for p in places)]
    return f"{nearest(name, everything)}. The model's adaptable modules: {listing(adaptable) or 'none'}"


def _usual(root: nn.Module, places: list[Place]) -> list[Place]:
    for names in _QUERY_VALUE:
        chosen = [p for p in places if p.path.rpartition(".")[2] in names and layer_class(p.module, p.parent)]
        if {p.path.rpartition(".")[2] for p in chosen} == set(names):
            return chosen
    chosen = [p for p in places if isinstance(p.module, nn.MultiheadAttention)]
    if not chosen:
        raise TargetError(
            f"lorica knows no usual targets for {type(root).__name__}; give target_modules, or "
            f'"all-linear"{_hint("", places)}'
        )
    return chosen


def _all_linear(root: nn.Module, places: list[Place]) -> list[Place]:
    head = _output_head(root)
    chosen = [
        p
        for p in places
        if p.module is not head
        and not isinstance(p.module, SavedModule)
        and (layer := layer_class(p.module, p.parent)) is not None
        and not issubclass(layer, (LoraEmbedding, LoraConv))
    ]
    if not chosen:
        raise TargetError(
            f'target_modules="all-linear", but {type(root).__name__} has no linear layer besides its head'
        )
    return chosen


def _output_head(root: nn.Module) -> nn.Module | None:
    try:
        return root.get_output_embeddings()  # type: ignore[operator, no-any-return]
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _in_blocks(chosen: list[Place], config: LoraConfig) -> list[Place]:
    layers = config.layers_to_transform
    wanted = {layers} if isinstance(layers, int) else set(layers or ())
    names = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    holder = "|".join(map(re.escape, names)) if names else r"[^.]+"
    pattern = re.compile(rf"(?:^|\.)(?:{holder})\.(\d+)(?:\.|$)")
    found = {p: int(hit[1]) for p in chosen if (hit := pattern.search(p.path))}
    missing = wanted - set(found.values())
    if missing:
        have = listing(map(str, sorted(set(found.values())))) or "none"
        where = f" in {listing(names)}" if names else ""
        raise TargetError(
            f"layers_to_transform names block {listing(map(str, sorted(missing)))}; the targeted "
            f"modules{where} are in blocks {have}"
        )
    return [p for p in chosen if found.get(p) in wanted]


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
    if config.lora_dropout and not layer.takes_dropout:
        raise TargetError(
            f"{path}: the update of an attention's fused weight has no input of its own to drop; "
            "set lora_dropout=0 for it"
        )
    return Target(path, module, layer)


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


def _inside(path: str, module: nn.Module) -> str:
    names = [p.path for p in walk(module) if p.path and layer_class(p.module, p.parent)]
    return f". Inside it are: {listing(f'{path}.{name}' for name in names)}" if names else ""
