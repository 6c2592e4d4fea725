"""Embeddings and heads that share one table: one update for all of them (`ensure_weight_tying`)."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.adapter import Factors
from lorica.config import LoraConfig
from lorica.errors import LoricaWarning, TargetError, listing
from lorica.find import Target, matching
from lorica.layers import LoraEmbedding, LoraLayer, tie_factors, tied_factors
from lorica.piece import Beginning, Contents, Held, Piece, Value
from lorica.pieces import Kind, Search, register
from lorica.pieces.low_rank import LowRank, own
from lorica.pieces.plugins.tokens import TokenRows
from lorica.pieces.whole import WholeCopy
from lorica.state import AdapterState
from lorica.tree import Place, module_at, only_holds, parameter_at, put_at, walk

Pairs = Mapping[str, str]
"""Path of a module → path of the embedding whose update is its own."""


class Tied(LowRank):
    """The update of a module that is an embedding's, transposed; `table` is that embedding's path."""

    table = ""

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:  # noqa: D102
        module, table = self.target.module, module_at(root, self.table)
        assert isinstance(table, LoraEmbedding)
        host = module if isinstance(module, LoraLayer) else self.target.layer.take(module, state)
        tie_factors(host, name, table)
        self.begun = None

    def _shared(self, name: str) -> dict[str, Parameter]:
        on = isinstance(self.target.module, LoraLayer) and self.begun is None
        return (tied_factors(self.layer, name) if on else None) or {}

    def tensors(self, name: str) -> Iterator[Held]:  # noqa: D102
        shared = self._shared(name)
        for held, leaf in zip(super().tensors(name), shared or ("", ""), strict=True):
            yield held._replace(live=f"{self.target.path}.{leaf}") if leaf else held

    def begin_again(self, name: str, at: Beginning) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of the table, which start as this module's are drawn."""
        shared = list(self._shared(name).values())
        for i, (tensor, value) in enumerate(super().begin_again(name, at)):
            yield (shared[i], value.t()) if shared else (tensor, value)

    def give(self, name: str, contents: Contents, value: Value) -> None:  # noqa: D102
        shared = self._shared(name)
        if not shared:
            super().give(name, contents, value)
            return
        A, B = (value(f"{self.target.path}.{leaf}", parameter).t() for leaf, parameter in shared.items())
        contents.factors[self.path] = Factors(A, B, self.scale(name), self.target.layer.kind)


class TiedTables(Kind):
    """Makes one of the updates, and of the copies, of tables that are one weight."""

    def prepare(self, search: Search) -> None:  # noqa: D102
        lora, adapter = search.lora, search.adapter
        assert lora is not None
        if adapter is None:
            search.rename(with_tied(search.root, lora))
        elif adapter.config is lora:
            # PEFT ties what is called embed_tokens or lm_head, and of others brings one table alone.
            brought = {*adapter.factors, *(name.rpartition(".")[0] for name in adapter.extras)}
            config = with_tied(search.root, lora, brought)
            search.take(config, dataclasses.replace(adapter, config=config))

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        return ()

    def finish(self, search: Search) -> None:  # noqa: D102
        lora, root = search.lora, search.root
        assert lora is not None
        pieces = {p.target.path: p for p in search.of(LowRank) if p.target.parameter is None}
        found = pairs(root, lora, pieces)
        if search.adapter is None:
            for path, table in found.items():
                check_pair(pieces[path].target, pieces[table].target, lora)
                _start_as(pieces[table], pieces[path])
            rows = (piece.path for piece in search.of(TokenRows))
            warn_if_idle(root, lora, (*pieces, *search.whole, *rows))
        else:
            search.problems += untied(root, lora, search.whole, search.adapter.extras)
            found = _alike(found, search.adapter.factors)
        for path, table in found.items():
            piece = pieces[path]
            assert piece.begun is not None
            tied = Tied(piece.target, piece.begun, lora)
            tied.table = table
            search.pieces.remove(piece)
            search.pieces.append(tied)  # after the table, which has what it shares
        tie_copies({piece.path: piece for piece in search.of(WholeCopy)})


def _start_as(table: LowRank, head: LowRank) -> None:
    """Let an embedding's factors start as its head's were drawn, as the embedding stores them."""
    assert table.begun is not None
    assert head.begun is not None
    A, B = head.begun.A, head.begun.B
    if head.target.layer.transposed != table.target.layer.transposed:
        A, B = B.t(), A.t()
    A, B = (
        own(table.target, factor) if factor.device.type != "meta" else factor.contiguous()
        for factor in (A, B)
    )
    table.begun = dataclasses.replace(table.begun, A=A, B=B)


def _alike(found: Pairs, factors: Mapping[str, Factors]) -> dict[str, str]:
    """Those pairs whose factors are one update in an adapter.

    Warns:
        LoricaWarning: others are not.
    """
    found = {path: table for path, table in found.items() if path in factors and table in factors}
    different = unlike(found, factors)
    if different:
        warnings.warn(
            f"ensure_weight_tying is set, but the adapter has other factors for {listing(different)} than "
            f"for {listing(found[path] for path in different)}, as PEFT makes them beside a 16-bit base; "
            "they are two updates here too, and merging unties the tables",
            LoricaWarning,
            stacklevel=8,
        )
    return {path: table for path, table in found.items() if path not in different}


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
    tables = groups(place for place in walk(root) if place.path)
    places = [place for group in tables for place in group]
    changes: dict[str, Any] = {}
    for field in ("target_modules", "modules_to_save"):
        given = getattr(config, field)
        named = [place.path for place in matching(given or (), places)]
        tied = [place for group in tables if any(place.path in named for place in group) for place in group]
        more = [p for p in tied if p.path not in named and (among is None or p.path in among)]
        left_out = [place.path for place in matching(config.exclude_modules or (), more)]
        if left_out:
            raise TargetError(
                f"exclude_modules leaves out {listing(left_out)}, but with ensure_weight_tying it trains "
                f"with {listing(named)}; drop one of the two"
            )
        added = [place.path for place in more]
        if added and isinstance(given, str):
            changes[field] = "|".join([f"(?:{given})", *map(re.escape, added)])
        elif added:
            changes[field] = [*given, *added]
    return config.replace(**changes) if changes else config


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


def unlike(found: Pairs, factors: Mapping[str, Factors]) -> list[str]:
    """The modules whose factors are not the embedding's, transposed."""
    return [path for path, table in found.items() if not factors[path].shares(factors[table])]


def untied(
    root: nn.Module, config: LoraConfig | None, saved: Collection[str], extras: Mapping[str, Tensor]
) -> list[str]:
    """The fault of tables that share one trained copy and come with values that differ.

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


def tie_copies(saved: Mapping[str, WholeCopy]) -> None:
    """Tie an adapter's copies of whole modules as the modules themselves are tied.

    Args:
        saved: path → copy.
    """
    first: dict[Parameter, Parameter] = {}
    for piece in saved.values():
        for leaf, twin in list(piece.twin.named_parameters(remove_duplicate=False)):
            base = parameter_at(piece.module, leaf)
            if first.setdefault(base, twin) is not twin:
                put_at(piece.twin, leaf, first[base])


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


register(TiedTables(), "ensure_weight_tying")
