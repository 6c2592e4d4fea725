"""Match a module's parameters with PEFT's files, which number them but do not name them.

    mlp.experts              the parameter that the module registered last
    mlp.experts.base_layer   the one before it

Where patterns give them different ranks, their shapes tell: all have the same number of experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from lorica.config import LoraConfig

# Stacked weights as the mixtures of experts register them, first to last.
_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "gate_up_proj_bias", "down_proj", "w2")
_MOST = 6


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
