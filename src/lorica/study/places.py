"""Where in a model a module stands: which block, and which projection of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


class Spot(NamedTuple):
    """A module's block, None outside the blocks, and its name in the block."""

    layer: int | None
    projection: str


def spots(paths: Iterable[str]) -> dict[str, Spot]:
    """Path → where it stands; projections by the shortest names that tell them apart.

    ``encoder.layer.3.attention.self.query`` is the ``query`` of block 3, unless something else in the blocks
    ends in that name too.
    """
    found = {}
    for path in paths:
        hit = _BLOCK.search(path)
        found[path] = Spot(int(hit[1]), hit[2]) if hit else Spot(None, path)
    whole = {spot.projection for spot in found.values()}
    short = {name: _shortest(name, whole) for name in whole}
    return {path: Spot(spot.layer, short[spot.projection]) for path, spot in found.items()}


def _shortest(name: str, others: set[str]) -> str:
    parts = name.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
    return next(
        end for end in ends if sum(f".{other}".endswith(f".{end}") for other in others) == 1 or end == name
    )
