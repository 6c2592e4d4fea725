"""A dry run of a configuration: what it would adapt, train whole and add, and how many parameters that is.

config ──find pieces, without values──▶ [piece, ...] ──▶ a row each
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorica.config import AdapterConfig, as_config
from lorica.model.adapt import adapt
from lorica.model.count import ParameterCount, trainable_parameters
from lorica.model.pretrained.skeleton import skeleton
from lorica.piece import Held, Piece
from lorica.pieces import Search, looking, resolve
from lorica.pieces.low_rank import LowRank
from lorica.pieces.plugins.statistics import RunningStatistic
from lorica.pieces.plugins.tied import Tied
from lorica.pieces.plugins.tokens import TokenRows
from lorica.pieces.whole import WholeCopy
from lorica.state import AdapterState, find_adapted


@dataclass(frozen=True)
class PreviewRow:
    """One module's part.

    Args:
        path: of the module, or name of the parameter or part.
        kind: ``"lora"``, ``"dora"``, ``"whole"`` (a copy is trained), ``"parameter"`` (of one parameter),
            ``"rows"`` (of an embedding), or the method that adds a part.
        shape: of the weight as (d_out, d_in, ...), or of what is trained.
        r: rank, where there is one.
        parameters: that it has.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    r: int | None
    parameters: int


@dataclass(frozen=True)
class Preview:
    """The effect of a configuration on a model.

    Args:
        rows: a row for each module, in the model's order within each kind.
        trainable: parameters that would train; a tied one counts once.
        total: parameters that the model would hold, by PEFT's convention.
        notes: what only training shows.
    """

    rows: tuple[PreviewRow, ...]
    trainable: int
    total: int
    notes: tuple[str, ...] = ()

    @property
    def adapted(self) -> dict[str, int]:
        """Path of each module with a low-rank update → its rank."""
        return {row.path: row.r for row in self.rows if row.r is not None}

    @property
    def whole(self) -> list[str]:
        """Paths of the modules that would be trained whole."""
        return [row.path for row in self.rows if row.kind == "whole"]

    def __str__(self) -> str:
        """A table; modules that differ in the number of their block alone share a line."""
        groups: dict[tuple[Any, ...], list[PreviewRow]] = {}
        for row in self.rows:
            groups.setdefault((_pattern(row.path), row.kind, row.shape, row.r), []).append(row)
        cells = [["module", "times", "kind", "shape", "r", "parameters"]]
        for (pattern, kind, shape, r), rows in groups.items():
            path = rows[0].path if len(rows) == 1 else pattern
            numbers = f"{sum(row.parameters for row in rows):,}"
            rank = "" if r is None else str(r)
            cells.append([path, str(len(rows)), kind, " x ".join(map(str, shape)), rank, numbers])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        left = (0, 2, 3)
        lines = [
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        share = 100 * self.trainable / self.total if self.total else 0.0
        said = (
            f"{len(self.adapted)} modules adapted, {len(self.whole)} trained whole; "
            f"{self.trainable:,} of {self.total:,} parameters train ({share:.4g} %)"
        )
        return "\n".join([*lines, said, *self.notes])


def preview(model: Any, config: AdapterConfig | Iterable[AdapterConfig] | None = None) -> Preview:
    """Say what `adapt` would do to a model, and leave the model as it is.

    No factor is drawn, no weight is copied and no memory taken: what is found has shapes, and no values.

    Args:
        model: a model, adapted or not, on the meta device too; or transformers' configuration of one, its
            fields with ``"model_type"``, or the folder or Hub name that it is loaded from.
        config: what to train; the defaults of `LoraConfig` if None. Several make up one adapter.

    Raises:
        LoricaError: whatever `adapt` would refuse, in the same words; but not that a start needs data.
    """
    config = as_config(config)
    root = model if isinstance(model, nn.Module) else skeleton(model, config.task_type)
    root, state = find_adapted(root) or (root, AdapterState())
    state.check_unmerged("look for what an adapter would hold")
    with looking(root, state, config):
        search = resolve(root, config, state=state)
        total = trainable_parameters(root).total
    rows = tuple(row for piece in search.pieces if (row := _row(piece, search)) is not None)
    new = {
        id(held.tensor): (piece, held.tensor)
        for piece in search.pieces
        if not isinstance(piece, Tied)
        for held in _parameters(piece)
    }
    beside = sum(t.numel() for piece, t in new.values() if not piece.stand_ins(""))
    trainable = sum(tensor.numel() for _, tensor in new.values())
    notes = ()
    if search.lora is not None and search.lora.init_lora_weights == "eva":
        notes = ("eva shares the ranks out anew once it has seen data; these are before that",)
    return Preview(rows, trainable, total + beside, notes)


def count(config: AdapterConfig | Iterable[AdapterConfig], model: Any) -> ParameterCount:
    """Count what a configuration would train on an architecture, without loading a weight.

    Args:
        config: what to train, by any method; several make up one adapter.
        model: transformers' configuration of the model, its fields with ``"model_type"``, or the folder or
            Hub name that it is loaded from.

    Raises:
        ConfigError: no model configuration can be had from that.
        TargetError: the configuration names what the model does not have, or the architecture cannot take the
            method.
        MissingExtra: transformers is not installed.
    """
    config = as_config(config)
    return trainable_parameters(adapt(skeleton(model, config.task_type), config))


def _parameters(piece: Piece) -> list[Held]:
    """The tensors of a piece that would train."""
    held = () if isinstance(piece, RunningStatistic) else piece.tensors("")
    return [h for h in held if h.tensor.is_floating_point() and not h.buffer]


def _row(piece: Piece, search: Search) -> PreviewRow | None:
    """One piece as a row."""
    held = _parameters(piece)
    tensors = [h.tensor for h in held]
    numel = sum(tensor.numel() for tensor in tensors)
    if isinstance(piece, LowRank):
        A, B = (h.tensor for h in list(piece.tensors(""))[:2])
        target = piece.target
        shape = (B.shape[0], *A.shape[1:])
        if target.parameter is not None:
            shape = target.module._parameters[target.parameter].shape  # type: ignore[union-attr]
        kind = "dora" if search.lora and search.lora.use_dora else "lora"
        r = search.lora.rank(target.pattern_path) if search.lora else len(A)
        return PreviewRow(target.pattern_path, kind, tuple(shape), r, numel)
    if not tensors:
        return None
    if piece.section == "added":
        method = "+".join(method.method for method in search.methods)
        return PreviewRow(piece.path, method, tuple(tensors[0].shape), None, numel)
    kind = (
        "whole" if isinstance(piece, WholeCopy) else "rows" if isinstance(piece, TokenRows) else "parameter"
    )
    return PreviewRow(piece.path, kind, tuple(tensors[0].shape), None, numel)


def _pattern(path: str) -> str:
    """A path with the numbers of blocks left open."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
