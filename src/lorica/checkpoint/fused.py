"""Several projections in one weight, as loralib's MergedLinear has them.

It stacks their updates (here q and v have one, k has none):

    A  = [A_q; A_v]  (2r, d_in)         B  = [B_q; B_v]  (2d, r)

That is one update per projection, or equally one update of the whole weight, whose B consists of blocks:

    B' = [B_q 0; 0 0; 0 B_v]  (3d, 2r)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.adapter import Factors
from lorica.errors import AdapterError, ConfigError, listing


class Parts(NamedTuple):
    """The projections in a fused weight; None for one without an update.

    Args:
        names: names of the projections; only their number counts where they stay in one weight.
        separate: whether the model has a module per projection, where the fused one would be.
    """

    names: tuple[str | None, ...]
    separate: bool

    @property
    def enabled(self) -> tuple[bool, ...]:
        """For each projection, whether it has an update: MergedLinear's `enable_lora`."""
        return tuple(name is not None for name in self.names)


def fused_parts(
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    split: Mapping[str, Sequence[str | None]] | None = None,
) -> dict[str, Parts]:
    """The fused weights that `enable_lora` and `split` describe, checked.

    Args:
        enable_lora: name of a fused module (a path or a dotted suffix) → MergedLinear's `enable_lora`.
        split: name of a fused module → the model's own module per projection, or None.

    Raises:
        ConfigError: a module is in both, or has no part with an update.
    """
    result = {
        name: Parts(tuple(str(i) if on else None for i, on in enumerate(enabled)), separate=False)
        for name, enabled in (enable_lora or {}).items()
    }
    for name, parts in (split or {}).items():
        if name in result:
            raise ConfigError(f"{name!r} is in enable_lora, which keeps it whole, and in split; choose one")
        result[name] = Parts(tuple(parts), separate=True)
    for name, parts in result.items():
        present = [part for part in parts.names if part is not None]
        if not present or len(set(present)) < len(present):
            raise ConfigError(f"the parts of {name!r} must name each of its updates once, not {parts.names}")
    return result


def spread(B: Tensor, enabled: Sequence[bool]) -> Tensor:
    """B of a MergedLinear, (d · updates, r), as that of one update of the whole weight; differentiable.

    Args:
        B: the updates' B, stacked.
        enabled: whether each projection has an update.

    Returns:
        (d · projections, r · updates): each update's rows in its own columns, zeros elsewhere.
    """
    count, r = sum(enabled), B.shape[1]
    blocks = B.chunk(count)
    padded = iter([F.pad(block, (i * r, (count - 1 - i) * r)) for i, block in enumerate(blocks)])
    return torch.cat([next(padded) if on else B.new_zeros(len(blocks[0]), r * count) for on in enabled])


def unpacked(path: str, A: Tensor, B: Tensor, lora_alpha: float, parts: Parts) -> dict[str, Factors]:
    """The updates in a MergedLinear's A and B, by the paths of the modules they update.

    Raises:
        AdapterError: A and B hold another number of updates.
    """
    count, r = sum(parts.enabled), B.shape[1]
    if A.shape[0] != count * r or B.shape[0] % count:
        raise AdapterError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} do not hold {count} updates, as was said of it"
        )
    scale = lora_alpha / r
    if not parts.separate:
        return {path: Factors(A, spread(B, parts.enabled), scale)}
    names = [_beside(path, name) for name in parts.names if name is not None]
    return {
        name: Factors(a, b, scale) for name, a, b in zip(names, A.chunk(count), B.chunk(count), strict=True)
    }


def groups(factors: Mapping[str, Factors], name: str, parts: Parts) -> dict[str, list[str]]:
    """Path of each fused weight of that name → paths of its updates."""
    if not parts.separate:
        return {path: [path] for path in factors if ends_with(path, name)}
    leaves = [part for part in parts.names if part is not None]
    fused = {_beside(path, name.rpartition(".")[2]) for path in factors if path.rpartition(".")[2] in leaves}
    return {path: [_beside(path, leaf) for leaf in leaves] for path in sorted(fused) if ends_with(path, name)}


def packed(members: Sequence[Factors | None], paths: Sequence[str], parts: Parts) -> tuple[Tensor, Tensor]:
    """A and B of the MergedLinear that holds these updates: the inverse of `unpacked`.

    Raises:
        AdapterError: one is missing, they differ in rank or scale, or one is not made of blocks.
    """
    found = [f for f in members if f is not None]
    if len(found) < len(members):
        missing = [path for path, f in zip(paths, members, strict=True) if f is None]
        raise AdapterError(f"there is no update for {listing(missing)}")
    if any(f.kind != "linear" for f in found):
        raise AdapterError("only linear layers can stand in one weight")
    if not parts.separate:
        return _gathered(found[0], parts.enabled)
    first = found[0]
    if any((f.A.shape, f.B.shape, f.scale) != (first.A.shape, first.B.shape, first.scale) for f in found):
        each = listing(f"{path} has r={f.r}, scale {f.scale:g}" for path, f in zip(paths, found, strict=True))
        raise AdapterError(f"a MergedLinear's parts share their shape, rank and alpha, and here {each}")
    return torch.cat([f.A for f in found]), torch.cat([f.B for f in found])


def _gathered(f: Factors, enabled: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Undo `spread`, where that loses nothing."""
    count = sum(enabled)
    if f.B.shape[0] % len(enabled) == 0 and f.r % count == 0:
        rows = [part for part, on in zip(f.B.chunk(len(enabled)), enabled, strict=True) if on]
        r = f.r // count
        B = torch.cat([part[:, i * r : (i + 1) * r] for i, part in enumerate(rows)])
        if torch.equal(spread(B, enabled), f.B):
            return f.A, B
    raise AdapterError(
        f"its B {tuple(f.B.shape)} is not made of {count} blocks with zeros elsewhere, so it is no "
        f"MergedLinear's with enable_lora={list(enabled)}; without, it is written as a Linear's"
    )


def _beside(path: str, leaf: str) -> str:
    """The path of the sibling of that name of the module at `path`."""
    owner, dot, _ = path.rpartition(".")
    return owner + dot + leaf


def ends_with(path: str, name: str) -> bool:
    """Whether a name is the path, or its last dotted parts."""
    return path == name or path.endswith(f".{name}")
