"""Targets and adapters by the names that modules had before transformers 5 stacked experts in parameters.

    experts.3.w1, experts.3.w3   ──▶  experts.gate_up_proj   [A1; A3], and B1 and B3 in blocks: twice the rank
    experts.3.w2                 ──▶  experts.down_proj
    gate                         ──▶  gate.weight

Which architectures that is for, and what became of other names, transformers tells itself; what PEFT makes
of a configuration there is what is made of it here.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapter import Adapter, Factors
from lorica.config import LoraConfig, exactly, full_match
from lorica.errors import AdapterError, TargetError, listing
from lorica.find import all_linear, means_all_linear
from lorica.piece import Piece
from lorica.pieces import Kind, Search, register
from lorica.tree import Place, base_parameters, model_type, walk

# Kind of mixture → name before → parameter now.
_NOW = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
_FUSED = {"mixtral": ("w1", "w3"), "qwen2_moe": ("gate_proj", "up_proj")}


def _conversions() -> Any:
    """Transformers' own account of what it renamed; None without it, or before its version 5."""
    if "transformers" not in sys.modules:
        return None
    try:
        return importlib.import_module("transformers.conversion_mapping")
    except ImportError:
        return None


def _mixture(root: nn.Module) -> str | None:
    """The kind of mixture of experts of a model whose modules became parameters; None for others."""
    kind, told = model_type(root), _conversions()
    if kind is None or told is None:
        return None
    types = {**getattr(told, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    found = types.get(kind)
    return found if found in _NOW else None


class Renamed(Kind):
    """Nothing of its own: says what the configuration, or the adapter, names by the names of now."""

    of_transformers = True

    def prepare(self, search: Search) -> None:  # noqa: D102
        if search.adapter is not None:
            adapter = adapter_now(search.root, search.adapter)
            search.take(adapter.config, adapter)
        elif search.lora is not None:
            search.rename(config_now(search.root, search.lora))

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        return ()


def config_now(root: nn.Module, config: LoraConfig) -> LoraConfig:
    """A configuration in which targets that became parameters are named as such.

    Args:
        root: the model.
        config: as a user wrote it, or an older file has it.

    Raises:
        TargetError: of two weights that became one, only one is targeted.
    """
    kind = _mixture(root)
    if kind is None or config.target_modules is None:
        return config
    now, fused = _NOW[kind], _FUSED[kind]
    places = [place for place in walk(root) if place.path]
    parameters = [name for name in base_parameters(root) if "." in name]
    if isinstance(config.target_modules, str):
        names = _spelt_out(root, config.target_modules, places, parameters, now)
    else:
        names = list(config.target_modules)
    old = {name: last for name in names if (last := name.rpartition(".")[2]) in now}
    if not old:
        return config
    taken = set(old.values())
    missing = [name for name in fused if name not in taken]
    if missing and len(missing) < len(fused):
        part, whole = listing(sorted(taken & set(fused))), now[fused[0]]
        raise TargetError(
            f"Cannot convert PEFT target(s) {part} without also targeting {listing(missing)} because they "
            f"are fused into {whole}. target_modules names {part} without {listing(missing)}, and in "
            f"this {type(root).__name__} they are one weight, {whole}; name both"
        )
    wanted = [now[name] for name in now if name in taken]
    there = [name for name in dict.fromkeys(wanted) if any(path.endswith(f".{name}") for path in parameters)]
    if not there:
        return config
    changes: dict[str, Any] = {
        "target_modules": sorted(name for name in names if name not in old),
        "target_parameters": list(dict.fromkeys([*(config.target_parameters or []), *there])),
    }
    if not missing:
        key, times = rf".*\.{re.escape(now[fused[0]])}", len(fused)
        changes["rank_pattern"] = {**config.rank_pattern, key: config.r * times}
        changes["alpha_pattern"] = {**config.alpha_pattern, key: config.lora_alpha * times}
    return config.replace(**changes)


def _spelt_out(
    root: nn.Module, pattern: str, places: list[Place], parameters: list[str], now: Mapping[str, str]
) -> list[str]:
    """The last names of what "all-linear" or a regular expression means, those of before included."""
    if means_all_linear(pattern):
        return sorted({p.path.rpartition(".")[2] for p in all_linear(root, places)} | now.keys())
    paths = [*(place.path for place in places), *parameters]
    found = {path.rpartition(".")[2] for path in paths if full_match(pattern, path)}
    for before, name in now.items():
        owners = {path.rpartition(".")[0] for path in parameters if path.rpartition(".")[2] == name}
        if any(full_match(pattern, f"{owner}.{before}") for owner in owners):
            found.add(before)
    # What is no expert's means what it says, by the expression itself.
    return sorted(found) if found & now.keys() else [pattern]


def adapter_now(root: nn.Module, adapter: Adapter) -> Adapter:
    """An adapter by the names that the model's modules have now.

    Args:
        root: the model.
        adapter: perhaps made when they had others.

    Raises:
        AdapterError: its experts cannot be put together.
    """
    config = adapter.config
    if not isinstance(config, LoraConfig):
        return adapter
    paths = {place.path for place in walk(root)}
    strange = [p for p, f in adapter.factors.items() if f.kind != "parameter" and p not in paths]
    if not strange or (told := _conversions()) is None or model_type(root) is None:
        return adapter
    try:
        entries = told.get_model_conversion_mapping(root)
        loading = importlib.import_module("transformers.core_model_loading")
        renamings = [entry for entry in entries or [] if isinstance(entry, loading.WeightRenaming)]
    except (AttributeError, ImportError, TypeError):
        return adapter

    def now(path: str) -> str:
        return loading.rename_source_key(f"{path}.weight", renamings, [])[0].removesuffix(".weight")

    names = {path: path if path in paths else now(path) for path in adapter.factors}
    factors = {names[path]: f for path, f in adapter.factors.items()}
    config = _with_patterns(config, names)
    if config.modules_to_save:
        there = [f".{path}" for path in paths]
        saved = [n if any(p.endswith(f".{n}") for p in there) else now(n) for n in config.modules_to_save]
        config = config.replace(modules_to_save=saved)
    extras = {
        name: tensor
        for old, tensor in adapter.extras.items()
        for name in [_extra_now(root, old, renamings, loading)]
    }
    if len(factors) < len(adapter.factors):
        raise AdapterError("two modules of the adapter have one name in this model")
    kind = _mixture(root)
    if kind is not None:
        config, factors = config_now(root, config), _stacked(root, config, factors, kind)
    pattern = config.target_modules
    if isinstance(pattern, str) and not means_all_linear(pattern):
        found = [path for path, f in factors.items() if f.kind != "parameter"]
        if not all(full_match(pattern, path) for path in found):
            config = config.replace(target_modules=found)
    elif config.target_modules:
        ends = tuple(f".{name}" for name in config.target_modules)
        lost = [
            path for path, f in factors.items() if f.kind != "parameter" and not f".{path}".endswith(ends)
        ]
        if lost:
            config = config.replace(target_modules=[*config.target_modules, *lost])
    return dataclasses.replace(adapter, config=config, factors=factors, extras=extras)


def _with_patterns(config: LoraConfig, names: Mapping[str, str]) -> LoraConfig:
    """A configuration whose ranks and alphas hold for modules by their names now.

    Args:
        config: as it was.
        names: name before → name now.
    """
    moved = {before: now for before, now in names.items() if before != now}
    r, alpha = config.rank, config.alpha
    ranks = {exactly(now): r(old) for old, now in moved.items() if r(old) != r(now)}
    alphas = {exactly(now): alpha(old) for old, now in moved.items() if alpha(old) != alpha(now)}
    if not ranks and not alphas:
        return config
    return config.replace(
        rank_pattern={**ranks, **config.rank_pattern}, alpha_pattern={**alphas, **config.alpha_pattern}
    )


def _extra_now(root: nn.Module, name: str, renamings: list[Any], loading: Any) -> str:
    here = name in base_parameters(root) or any(name.startswith(f"{p.path}.") for p in walk(root) if p.path)
    return name if here else loading.rename_source_key(name, renamings, [])[0]


def _stacked(
    root: nn.Module, config: LoraConfig, factors: Mapping[str, Factors], kind: str
) -> dict[str, Factors]:
    """Factors with those of single experts put together as their stacked parameters have them.

    Raises:
        AdapterError: an expert, or one of two weights that became one, is missing.
    """
    now, fused = _NOW[kind], _FUSED[kind]
    parameters = base_parameters(root)
    found: dict[str, dict[str, dict[int, Factors]]] = {}
    result: dict[str, Factors] = {}
    for path, f in factors.items():
        hit = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)", path)
        name = path.rpartition(".")[2]
        if hit and hit[3] in now and f"{hit[1]}.{now[hit[3]]}" in parameters:
            found.setdefault(hit[1], {}).setdefault(hit[3], {})[int(hit[2])] = f
        elif (
            name == "gate"
            and f"{path}.weight" in parameters
            and f.kind == "linear"
            and _is_router(root, path)
        ):
            result[path] = dataclasses.replace(f, kind="parameter")
        else:
            result[path] = f
    for owner, by_name in found.items():
        # The parameter that the module registered last has the module's path; each before it one more suffix.
        order = [
            leaf for leaf in root.get_submodule(owner)._parameters if leaf in {now[name] for name in by_name}
        ]
        for depth, leaf in enumerate(reversed(order)):
            sources = fused if leaf == now[fused[0]] else tuple(name for name in now if now[name] == leaf)
            experts = parameters[f"{owner}.{leaf}"].shape[0]
            parts = [[by_name.get(name, {}).get(e) for name in sources] for e in range(experts)]
            result[owner + ".base_layer" * depth] = _stack(f"{owner}.{leaf}", parts)
    return result


def _is_router(root: nn.Module, path: str) -> bool:
    """Whether a gate is a module of its own making, whose weight is a parameter, and no linear layer."""
    return not isinstance(root.get_submodule(path), nn.Linear)


def _stack(name: str, parts: list[list[Factors | None]]) -> Factors:
    """One update of a stack, from those of its experts: each a list of the weights that became one."""
    given = [[f for f in part if f is not None] for part in parts]
    absent = [
        str(e) for e, (part, have) in enumerate(zip(parts, given, strict=True)) if len(have) < len(part)
    ]
    if absent:
        raise AdapterError(
            f"{name}: the adapter has no update, or half of one, for experts {listing(absent)}"
        )
    first = given[0][0]
    if any((f.scale, f.r) != (first.scale, first.r) for have in given for f in have):
        raise AdapterError(
            f"{name}: its experts have updates of other ranks or scales, which no stack can hold"
        )
    A = torch.cat([torch.cat([f.A for f in have]) for have in given])
    blocks = torch.stack([torch.block_diag(*(f.B for f in have)) for have in given])
    return Factors(A, blocks.permute(1, 2, 0).flatten(1), first.scale, "parameter")


def swapped(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Factors of a stack whose update is the transpose: each expert's ``Aᵀ·Bᵀ`` in place of ``B·A``.

    Args:
        A: (experts·r, d), expert after expert.
        B: (d', r·experts), an expert's columns `experts` apart.
        experts: how many.

    Returns:
        A (experts·r, d') and B (d, r·experts), laid out likewise.
    """
    As = A.reshape(experts, -1, A.shape[1])
    Bs = B.reshape(B.shape[0], -1, experts).permute(2, 1, 0)
    return Bs.flatten(0, 1).contiguous(), As.permute(2, 1, 0).flatten(1).contiguous()


register(Renamed())
