"""A dry run of a configuration: what it would adapt, train whole and add, and how many parameters that is.

model ──same modules, values left out──▶ a copy on the meta device ──adapt──▶ counted, thrown away
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from lorica.config import AdapterConfig, LoraConfig, as_config, members, method_of
from lorica.config.inits import BASE_KEPT
from lorica.model.adapt import adapt, adapters
from lorica.model.count import trainable_parameters
from lorica.model.methods import resolve_methods
from lorica.model.skeleton import skeleton
from lorica.model.starting import check_alone, check_start
from lorica.model.structure import adapted, lora_layers, saved_modules
from lorica.model.values import as_trained

_NAME = "preview"


@dataclass(frozen=True)
class PreviewRow:
    """What one module gets.

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
    """What a configuration would do to a model.

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

    No factor is drawn, no weight is read and no memory taken: the work is done on a copy without values.

    Args:
        model: a model, adapted or not, on the meta device too; or transformers' configuration of one, its
            fields with ``"model_type"``, or the folder or Hub name that it is loaded from.
        config: what to train; the defaults of `LoraConfig` if None. Several make up one adapter.

    Raises:
        LoricaError: whatever `adapt` would refuse, in the same words; but not that a start needs data.
    """
    config = as_config(config)
    made = _weightless(model) if isinstance(model, nn.Module) else skeleton(model, config.task_type)
    for parameter in made.parameters():
        if parameter.requires_grad:  # so that what trains afterwards is this configuration's
            parameter.requires_grad_(False)
    light, notes = _drawn(made, config)
    taken = adapters(made)
    name = next(n for n in (_NAME, *(f"{_NAME}-{i}" for i in range(len(taken)))) if n not in taken)
    adapt(made, light, name, seed=0)
    count = trainable_parameters(made)
    return Preview(tuple(_rows(made, name)), count.trainable, count.total, notes)


def _weightless(model: nn.Module) -> nn.Module:
    """A copy whose plain tensors are on the meta device; packed ones, which do not train, are shared."""
    tensors: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is Parameter:
            empty = torch.empty_like(parameter, device="meta")
            tensors[id(parameter)] = Parameter(empty, requires_grad=parameter.requires_grad)
        elif not parameter.requires_grad:
            tensors[id(parameter)] = parameter
    for buffer in model.buffers():
        tensors.setdefault(id(buffer), torch.empty_like(buffer, device="meta"))
    return copy.deepcopy(model, tensors)


def _drawn(root: nn.Module, config: AdapterConfig) -> tuple[AdapterConfig, tuple[str, ...]]:
    """The configuration with a start that is drawn, once the modules are known to allow its own."""
    lora, _ = members(config)
    if lora is None:
        return config, ()
    check_alone(lora, config)
    if lora.init_lora_weights == "eva":
        return config, ("eva shares the ranks out anew once it has seen data; these are before that",)
    if lora.init_lora_weights in BASE_KEPT:
        return config, ()
    light = _plain(lora)
    for target in resolve_methods(root, light, 0).layers:
        check_start(target, lora)
    return light, ()


def _plain(lora: LoraConfig) -> LoraConfig:
    settings = {item.name: None for item in dataclasses.fields(lora) if item.name.endswith("_config")}
    kept = {name: value for name, value in settings.items() if getattr(lora, name) is not None}
    return lora.replace(init_lora_weights=True, **kept)


def _rows(root: nn.Module, name: str) -> Iterable[PreviewRow]:
    """What the adapter holds, module by module."""
    _, state = adapted(root)
    adapter = as_trained(root, name)
    lora, others = members(adapter.config)
    for path, layer in lora_layers(root).items():
        for _, live, holder in layer.holders(name) if name in layer.scaling else ():
            leaf = live.rpartition(".")[2]
            f = holder.factors(name)
            own = (f.A, f.B, *(t for t in (f.magnitude, f.bias) if t is not None))
            shape = layer.get_base(leaf).shape if leaf else (f.B.shape[0], *f.A.shape[1:])
            named = f"{path}.{leaf}" if leaf else path
            kind, r = "lora" if f.magnitude is None else "dora", lora.rank(named) if lora else f.r
            yield PreviewRow(named, kind, tuple(shape), r, sum(t.numel() for t in own))
    whole = {
        path: module.modules_to_save[name]
        for path, module in saved_modules(root).items()
        if name in module.modules_to_save
    }
    for path, module in whole.items():
        parameters = list(module.parameters())
        shape = tuple(parameters[0].shape) if parameters else ()
        yield PreviewRow(path, "whole", shape, None, sum(p.numel() for p in parameters))
    statistics = state.statistics.get(name, {})
    for key, tensor in adapter.extras.items():
        if key in statistics or any(key.startswith(f"{path}.") or not path for path in whole):
            continue
        path, _, leaf = key.partition(".token_adapter.")
        yield PreviewRow(path, "rows" if leaf else "parameter", tuple(tensor.shape), None, tensor.numel())
    parts = [method_of(part) for part in others]
    for key, tensor in adapter.added.items():
        yield PreviewRow(key, "+".join(parts), tuple(tensor.shape), None, tensor.numel())


def _pattern(path: str) -> str:
    """A path with the numbers of blocks left open."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
