"""Embeddings and heads that share one table: one update for all of them (`ensure_weight_tying`)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.adapter import Factors
from lorica.config import LoraConfig, full_match
from lorica.errors import LoricaWarning, TargetError, listing
from lorica.layers import LoraEmbedding, SavedModule
from lorica.model.structure import Place, Target, walk
from lorica.state import parameter_at
from lorica.state import place as put

Pairs = Mapping[str, str]
"""Path of a module → path of the embedding whose update is its own."""


def tied_with(places: Iterable[Place], module: nn.Module) -> list[str]:
    """Paths of the modules whose weight is that of `module`, its own included."""
    weight = module._parameters.get("weight")
    return [p.path for p in places if weight is not None and p.module._parameters.get("weight") is weight]


def only_holds(place: Place, tied: Collection[str]) -> bool:
    """Whether an embedding only holds the table in which others look up, as T5's `shared` does.

    Args:
        place: of the embedding.
        tied: paths of the other embeddings with the same table.
    """
    around, _, _ = place.path.rpartition(".")
    inside = f"{around}." if around else ""
    return bool(tied) and all(p.startswith(inside) and "." in p.removeprefix(inside) for p in tied)


def groups(places: Iterable[Place]) -> list[list[Place]]:
    """The modules that share one table, an embedding first; of each group only those that are called."""
    places = list(places)
    by_weight: dict[Parameter, list[Place]] = {}
    for place in places:
        weight = place.module._parameters.get("weight")
        if weight is not None:
            by_weight.setdefault(weight, []).append(place)
    found = []
    for group in by_weight.values():
        tables = [p for p in group if isinstance(p.module, nn.Embedding)]
        paths = [p.path for p in tables]
        called = [p for p in tables if not only_holds(p, [path for path in paths if path != p.path])]
        if called and len(group) > 1:
            found.append([*called, *(p for p in group if p not in tables)])
    return found


def with_tied(root: nn.Module, config: LoraConfig, among: Collection[str] | None = None) -> LoraConfig:
    """The configuration with the name of each module that shares a table with one it names.

    Args:
        root: the model.
        config: its `ensure_weight_tying` says whether they are to be named.
        among: paths of the modules that can be; None takes all.

    Raises:
        TargetError: one of those is left out by name.
    """
    if not config.ensure_weight_tying:
        return config
    places = [place for place in walk(root) if place.path]
    tables = [[place.path for place in group] for group in groups(places)]
    paths = [path for group in tables for path in group]
    changes: dict[str, Any] = {}
    for field in ("target_modules", "modules_to_save"):
        given = getattr(config, field)
        named = set(_matching(given, paths))
        more = [path for group in tables if named & {*group} for path in group if path not in named]
        more = [path for path in more if among is None or path in among]
        left_out = _matching(config.exclude_modules, more)
        if left_out:
            raise TargetError(
                f"exclude_modules leaves out {listing(left_out)}, but with ensure_weight_tying it trains "
                f"with {listing(named)}; drop one of the two"
            )
        if more and isinstance(given, str):
            changes[field] = "|".join([f"(?:{given})", *map(re.escape, more)])
        elif more:
            changes[field] = [*given, *more]
    return config.replace(**changes) if changes else config


def _matching(patterns: list[str] | str | None, paths: Iterable[str]) -> list[str]:
    if isinstance(patterns, str):
        return [path for path in paths if full_match(patterns, path)]
    ends = tuple(f".{name}" for name in patterns or ())
    return [path for path in paths if f".{path}".endswith(ends)]


def pairs(root: nn.Module, config: LoraConfig | None, adapted: Collection[str]) -> dict[str, str]:
    """The modules whose update is to be an embedding's.

    Args:
        root: the model.
        config: its `ensure_weight_tying` says whether there are any; None has none.
        adapted: paths of the modules with an update.

    Returns:
        Path of each → path of that embedding.
    """
    if config is None or not config.ensure_weight_tying:
        return {}
    return {
        place.path: table.path
        for table, *others in groups(place for place in walk(root) if place.path)
        for place in others
        if table.path in adapted and place.path in adapted
    }


def check_pair(target: Target, table: Target, config: LoraConfig) -> None:
    """Refuse two modules that are to have one update and cannot.

    Raises:
        TargetError: naming both.
    """
    path = target.path
    if config.use_dora:
        raise TargetError(
            f"{path} and {table.path} share one table, and DoRA gives a head one magnitude for each token, "
            "an embedding one for each dimension: one update cannot have both. Set use_dora=False or "
            "ensure_weight_tying=False, or leave the tables out"
        )
    for name, of in (("rank_pattern", config.rank), ("alpha_pattern", config.alpha)):
        if of(path) != of(table.path):
            raise TargetError(
                f"{name} gives {path} {of(path)} and {table.path} {of(table.path)}, but with "
                "ensure_weight_tying they share one update; give both the same"
            )
    if target.layer.transposed != issubclass(target.layer, LoraEmbedding):
        raise TargetError(
            f"{path} is a {type(target.module).__name__}, which cannot have the update of {table.path}; set "
            "ensure_weight_tying=False"
        )


def apart(found: Pairs, factors: Mapping[str, Factors]) -> list[str]:
    """The modules whose factors are not the embedding's, transposed."""
    return [path for path, table in found.items() if not factors[path].shares(factors[table])]


def torn(
    root: nn.Module, config: LoraConfig | None, saved: Collection[str], extras: Mapping[str, Tensor]
) -> list[str]:
    """What is wrong where tables that one copy is trained of come with values that differ.

    Args:
        root: the model.
        config: its `ensure_weight_tying` says whether they should not; None does not.
        saved: paths of the modules trained whole.
        extras: name → tensor trained whole.
    """
    if config is None or not config.ensure_weight_tying:
        return []
    problems = []
    for group in groups(place for place in walk(root) if place.path):
        first, *others = [f"{p.path}.weight" for p in group if p.path in saved] or [""]
        problems += [
            f"{name} is not equal to {first}, though ensure_weight_tying makes them one"
            for name in others
            if name in extras and first in extras and not torch.equal(extras[name], extras[first])
        ]
    return problems


def tie_copies(saved: Mapping[str, nn.Module], name: str) -> None:
    """Tie an adapter's copies of whole modules as the modules themselves are tied.

    Args:
        saved: path → module with a copy.
        name: of the adapter.
    """
    first: dict[Parameter, Parameter] = {}
    for module in saved.values():
        assert isinstance(module, SavedModule)
        copy = module.modules_to_save[name]
        for leaf, own in list(copy.named_parameters(remove_duplicate=False)):
            base = parameter_at(module, leaf)
            if first.setdefault(base, own) is not own:
                put(copy, leaf, first[base])


def warn_if_idle(root: nn.Module, config: LoraConfig, changed: Iterable[str]) -> None:
    """Say so where `ensure_weight_tying` finds nothing to tie.

    Args:
        root: the model.
        config: whose field it is.
        changed: paths of the modules that get an update, trained rows, or are trained whole.

    Warns:
        LoricaWarning: the model has no tied tables, or the configuration leaves them alone.
    """
    if not config.ensure_weight_tying:
        return
    tables, changed = groups(place for place in walk(root) if place.path), set(changed)
    if any(place.path in changed for group in tables for place in group):
        return
    what = (
        f"has nothing to tie: no tied modules are added: of the tied "
        f"{listing(place.path for place in tables[0])} none is adapted or trained"
        if tables
        else "but the model does not have tied weights: no tied modules were found in the model, for none of "
        f"this {type(root).__name__} is tied to an embedding"
    )
    warnings.warn(f"ensure_weight_tying=True {what}", LoricaWarning, stacklevel=5)
