"""Match a module's parameters with PEFT's files, which number them but do not name them.

    mlp.experts              the parameter that the module registered last
    mlp.experts.base_layer   the one before it

Where patterns give them different ranks, their shapes tell: all have the same number of experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from lorica.adapter import Factors, host_of
from lorica.config import LoraConfig, full_match

# Stacked weights as the mixtures of experts register them, first to last.
_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "gate_up_proj_bias", "down_proj", "w2")
_MOST = 6


def of_parameter(
    path: str,
    sides: Mapping[str, Tensor],
    halves_A: Mapping[str, Tensor],
    config: LoraConfig,
    scales: Mapping[str, float],
) -> Factors | str | None:
    """The factors of a parameter of a module, or why they are none; None where the module is a target itself.

    Args:
        path: in the file.
        sides: its A and B.
        halves_A: path in the file → A, for all updates.
        config: the configuration beside the file.
        scales: by path, if the file holds them.
    """
    host, _ = host_of(path)
    names = _names(host, config)
    if not names:
        return None
    beside = sorted((p for p in halves_A if host_of(p)[0] == host), key=len)  # the module's own first
    rows = {p: halves_A[p].shape[0] for p in beside}
    meant = told_apart(path, names, rows, config, scales)
    if meant is None:
        return (
            f"rank_pattern and alpha_pattern differ for {names}, and neither the file nor its shapes say "
            "which of them is which; give them one rank and alpha"
        )
    (r, scale), (A, B) = meant, (sides["A"], sides["B"])
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] % r:
        return (
            f"A {tuple(A.shape)} and B {tuple(B.shape)} are not the two halves of updates of rank {r}, one "
            "for each expert"
        )
    return Factors(A, B, scale, "parameter")


def _names(host: str, config: LoraConfig) -> list[str]:
    """The names that `target_parameters` may mean at a module; none if the module is itself a target."""
    modules = config.target_modules
    if isinstance(modules, str):
        is_target = full_match(modules, host)
    else:
        is_target = any(f".{host}".endswith(f".{name}") for name in modules or [])
    parts = [] if is_target else [name.rpartition(".") for name in config.target_parameters or []]
    return [f"{host}.{leaf}" for owner, _, leaf in parts if not owner or f".{host}".endswith(f".{owner}")]


def told_apart(
    path: str, names: Sequence[str], rows: Mapping[str, int], config: LoraConfig, scales: Mapping[str, float]
) -> tuple[int, float] | None:
    """Rank and scale of the parameter at a path in the file; None if they cannot be told.

    Args:
        path: in the file.
        names: the names that `target_parameters` may mean at that module.
        rows: of A, by path, of all its parameters in the file, the module's own path first.
        config: its patterns give each name a rank and a scale.
        scales: by path, if the file holds them.
    """
    meant = {name: (config.rank(name), config.scale(name)) for name in names}
    if len(set(meant.values())) == 1:
        return meant[names[0]]
    spelt = [name for name in names if any(_ends(name, full) for full in config.target_parameters or ())]
    names = spelt if len(spelt) == len(rows) else names
    if len(names) > _MOST or len(names) < len(rows):
        return None
    fitting = [chosen for chosen in itertools.permutations(names, len(rows)) if _fits(chosen, rows, meant)]
    if told := [chosen for chosen in fitting if _as_told(chosen, rows, meant, scales)]:
        fitting = told
    place = list(rows).index(path)
    found = {meant[chosen[place]] for chosen in fitting}
    if len(found) > 1:
        usual = [chosen for chosen in fitting if _in_order(chosen)]
        found = {meant[chosen[place]] for chosen in usual}
    return found.pop() if len(found) == 1 else None


def _ends(name: str, full: str) -> bool:
    return "." in full and f".{name}".endswith(f".{full}")


def _fits(chosen: Sequence[str], rows: Mapping[str, int], meant: Mapping[str, tuple[int, float]]) -> bool:
    ranks = [meant[name][0] for name in chosen]
    counts = {n // r for n, r in zip(rows.values(), ranks, strict=True)}
    whole = all(n % r == 0 for n, r in zip(rows.values(), ranks, strict=True))
    return whole and len(counts - {1}) <= 1  # a plain matrix beside stacks


def _as_told(
    chosen: Sequence[str],
    rows: Mapping[str, int],
    meant: Mapping[str, tuple[int, float]],
    scales: Mapping[str, float],
) -> bool:
    pairs = zip(rows, chosen, strict=True)
    return bool(scales) and all(
        math.isclose(scales.get(path, meant[name][1]), meant[name][1]) for path, name in pairs
    )


def _in_order(chosen: Sequence[str]) -> bool:
    leaves = [name.rpartition(".")[2] for name in chosen]
    if any(leaf not in _ORDER for leaf in leaves):
        return False
    places = [_ORDER.index(leaf) for leaf in leaves]
    return places == sorted(places, reverse=True)
