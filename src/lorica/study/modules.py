"""A model's modules in a study: each one's block, projection and W0.

W0 is read from the base's checkpoint, one weight at a time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.adapter import Adapter, Factors
from lorica.checkpoint.hub import locate_base
from lorica.checkpoint.stream.placement import Update, place
from lorica.checkpoint.stream.shards import DTYPES, Checkpoint, open_checkpoint, open_file, read_into
from lorica.errors import AdapterError

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


class Spot(NamedTuple):
    """A module's block, None outside the blocks, and its name in the block."""

    layer: int | None
    projection: str


def spots(paths: Iterable[str]) -> dict[str, Spot]:
    """Path → block and projection; projections by the shortest names that tell them apart.

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


class Weight(NamedTuple):
    """One W0 and its update.

    Args:
        path: the module; or the part of it, if the base splits a module that the adapter has in one.
        factors: the update.
        W: in the update's layout, d_out × d_in, in float32.
        stored: its dtype in the checkpoint.
    """

    path: str
    factors: Factors
    W: Float[Tensor, "d_out d_in"]
    stored: torch.dtype


def base_weights(adapter: Adapter, base: str | Path) -> Iterator[Weight]:
    """The weights that an adapter updates, read one at a time.

    Args:
        adapter: the updates.
        base: folder with `config.json` and safetensors, one file of safetensors, or a Hub name.

    Raises:
        FileError: the base cannot be found or read.
        AdapterError: lists the updates that have no place in it, or another shape.
        MissingExtra: a name on the Hub is given, and huggingface_hub is not installed.
    """
    alone = _updates_alone(Adapter.check(adapter))
    place_of_base = locate_base(base)
    checkpoint = (open_file if place_of_base.is_file() else open_checkpoint)(place_of_base)
    placement = place(alone, checkpoint)
    found = [(name, update) for name, updates in placement.updates.items() for update in updates]
    if placement.head and placement.untied and placement.untied.table:
        found.append((placement.untied.table, placement.head))
    if not found:
        raise AdapterError(f"{base} has none of the weights that the adapter updates")
    return (_read(checkpoint, name, update) for name, update in found)


def _updates_alone(adapter: Adapter) -> Adapter:
    """The adapter with its ``scale·B·A`` alone; its other tensors need not fit the checkpoint."""
    factors = {path: dataclasses.replace(f, magnitude=None, bias=None) for path, f in adapter.factors.items()}
    return Adapter(adapter.config.replace(modules_to_save=None), factors)


def _read(checkpoint: Checkpoint, name: str, update: Update) -> Weight:
    entry = checkpoint.entry(name)
    dtype, row = DTYPES[entry.dtype], torch.Size(entry.shape[1:])
    raw = torch.empty((update.stop - update.start, *row), dtype=dtype)
    with (checkpoint.folder / checkpoint.home[name]).open("rb", buffering=0) as file:
        read_into(file, entry.offset + update.start * row.numel() * dtype.itemsize, raw)
    W = raw.float().flatten(1)
    return Weight(update.label, update.factors, W.t() if update.transposed else W, dtype)
