"""A configuration derived from the names of an adapter's tensors, for files that come without one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lorica.adapter import Factors
from lorica.config import LoraConfig, exactly


def derived_config(factors: Mapping[str, Factors], extras: Iterable[str], **settings: Any) -> LoraConfig:
    """The configuration by which PEFT's files have these updates' ranks and scales.

    Args:
        factors: module path → update.
        extras: names of the tensors trained whole.
        settings: fields that are known; they are taken as they are.

    Raises:
        ConfigError: a setting is wrong.
    """
    ranks = {path: f.r for path, f in factors.items()}
    alphas = {path: _number(f.scale * f.r) for path, f in factors.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    biases, whole = _biases_and_whole(list(extras))
    derived: dict[str, Any] = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, r),
        "alpha_pattern": _patterns(alphas, alpha),
        "target_modules": _targets(list(factors)),
        "modules_to_save": _owners(whole, list(factors)) or None,
        "bias": "none" if not biases else "lora_only" if biases <= factors.keys() else "all",
    }
    return LoraConfig(**{**derived, **settings})


def _number(value: float) -> float:
    """A number that is whole, to rounding, as an int; others as they are."""
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(nearest, 1) else value


def _patterns(values: Mapping[str, float], usual: float) -> dict[str, Any]:
    """The values that differ from the usual one, keyed by a name's last part where all such modules agree."""
    by_leaf: dict[str, set[float]] = {}
    for path, value in values.items():
        by_leaf.setdefault(_leaf(path), set()).add(value)
    return {
        _leaf(path) if len(by_leaf[_leaf(path)]) == 1 else exactly(path): value
        for path, value in values.items()
        if value != usual
    }


def _targets(paths: list[str]) -> list[str]:
    """The last parts of the names if every block has all of them; else whole names."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in paths:
        before, _, after = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", path).partition("*")
        numbers = ".".join(part for part in path.split(".") if part.isdigit())
        found.setdefault(before, {}).setdefault(after, set()).add(numbers)
    regular = all(
        blocks in ({""}, {str(i) for i in range(len(blocks))}) and blocks == next(iter(kinds.values()))
        for kinds in found.values()
        for blocks in kinds.values()
    )
    return sorted({_leaf(path) for path in paths} if regular else paths)


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _biases_and_whole(extras: list[str]) -> tuple[set[str], list[str]]:
    """The modules of biases that come without their weight, and the names of all other tensors."""
    named = set(extras)

    def alone(name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        return leaf == "bias" and f"{owner}.weight" not in named

    biases = {name.rpartition(".")[0] for name in extras if alone(name)}
    return biases, [name for name in extras if not alone(name)]


def _owners(names: list[str], adapted: list[str]) -> list[str]:
    """The modules that tensors trained whole belong to: the largest that hold no adapted module."""
    owners = sorted({name.rpartition(".")[0] for name in names} - {""})
    groups: dict[str, list[str]] = {}
    for owner in owners:
        groups.setdefault(_outermost(owner, lambda path: not _any_inside(path, adapted)), []).append(owner)
    return sorted({_common(group) for group in groups.values()})


def _outermost(path: str, ok: Callable[[str], bool]) -> str:
    parts = path.split(".")
    prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if ok(prefix)), path)


def _any_inside(path: str, others: list[str]) -> bool:
    return any(other == path or other.startswith(f"{path}.") for other in others)


def _common(paths: list[str]) -> str:
    split = [path.split(".") for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
