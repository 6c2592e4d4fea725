"""Place an adapter's tensors in a checkpoint: rows that get an update, and tensors that are replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.adapter import TOKEN_ROWS, Adapter, Factors
from lorica.checkpoint.stream.names import Names, fused, fused_rows, match, split, whole
from lorica.checkpoint.stream.shards import DTYPES, Checkpoint, Entry
from lorica.checkpoint.stream.ties import Tie, find_tie, is_table
from lorica.errors import AdapterError, lines, nearest

# transformers' models that hold their linear layers' weights (d_in, d_out), and what those layers are called.
_GPT2 = ("c_attn", "c_proj", "c_fc", "q_attn")
_CONV1D: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("gpt2", "imagegpt", "openai-gpt", "decision_transformer"), _GPT2
)


class Update(NamedTuple):
    """``scale·B·A`` for some rows of a tensor.

    Args:
        label: the module, for messages and the report.
        start: first row.
        stop: row after the last.
        factors: of those rows alone.
        transposed: whether the tensor is stored (d_in, d_out).
    """

    label: str
    start: int
    stop: int
    factors: Factors
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows that it updates."""
        shape = (self.factors.B.shape[0], *self.factors.A.shape[1:])
        return shape[::-1] if self.transposed else shape

    def product(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The matrices whose product, times the scale, is the update in the tensor's layout.

        They are copies, in memory aligned as a live model's: BLAS's rounding depends on alignment too.
        """
        A, B = (f.detach().flatten(1).to(dtype, copy=True) for f in (self.factors.A, self.factors.B))
        return (A.t(), B.t()) if self.transposed else (B, A)


@dataclass(frozen=True)
class Placement:
    """The place of each of an adapter's tensors in a checkpoint.

    Args:
        names: translates the adapter's names to the file's.
        updates: tensor in the file → its updates, in the order of their rows.
        replaced: tensor in the file → its replacement.
        added: name in the merged checkpoint → a tensor that the file does not have.
        untied: the base's tie that the adapter breaks; None if it breaks none.
        head: update of an output embedding that the base ties, and that now needs a tensor of its own.
    """

    names: Names
    updates: dict[str, list[Update]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    untied: Tie | None = None
    head: Update | None = None


def place(adapter: Adapter, base: Checkpoint) -> Placement:
    """Find the place in a checkpoint for everything an adapter holds.

    Raises:
        AdapterError: lists the tensors that have no place, or do not fit it.
    """
    lora, _ = adapter.config.members()
    if lora is not None and lora.layer_replication:
        raise AdapterError(
            "the adapter is for a deeper model than the one on disk (layer_replication), so it is not merged "
            "there; merge it in memory and save the model"
        )
    matrices = [name.removesuffix(".weight") for name in adapter.extras if name.endswith(".weight")]
    names = match([*adapter.factors, *matrices], base.home)
    tie = find_tie(base, names, adapter.config.task_type)
    problems: list[str] = []
    result = Placement(names)
    for name, tensor in adapter.extras.items():
        problems += _place_extra(result, adapter, base, tie, name, tensor)
    head: Update | None = None
    for path, factors in adapter.factors.items():
        if tie and not tie.stored and names.added(f"{path}.weight") == tie.head:
            head = Update(path, 0, factors.B.shape[0], factors)
        else:
            problems += _place_factors(result, adapter, base, path, factors)
    problems += _missing(result, adapter, base)
    touched = {*result.updates, *result.replaced, *result.added, *([tie.head] if head and tie else [])}
    if tie and not touched.isdisjoint((tie.head, tie.table, *filter(is_table, touched))):
        problems += _tie_problems(base, tie, head)
        if _still_one(result, tie, head):
            added = {name: tensor for name, tensor in result.added.items() if name != tie.head}
            result = Placement(names, result.updates, result.replaced, added)
        else:
            result = Placement(names, result.updates, result.replaced, result.added, tie, head)
    if problems:
        raise AdapterError(f"the adapter does not fit {base.folder}:\n{lines(problems)}")
    return result


def _place_extra(
    result: Placement, adapter: Adapter, base: Checkpoint, tie: Tie | None, name: str, tensor: Tensor
) -> list[str]:
    if name.endswith(TOKEN_ROWS):
        return [
            f"{name}: single rows of a table (trainable_token_indices) are not merged on disk; merge it in "
            "memory"
        ]
    there, is_whole = result.names.to_file(name), trained_whole(adapter, name)
    if there not in base:
        added = result.names.added(name)
        if not is_whole and not (tie and added == tie.head):
            return [f"unexpected: {name} is not in the base{nearest(there, base.home, limit=1)}"]
        result.added[added] = tensor
        return []
    entry = base.entry(there)
    if entry.dtype not in DTYPES and (tensor.is_floating_point() or tensor.nbytes != entry.nbytes):
        return [f"dtype of {name}: the base holds it as {entry.dtype}, and it cannot take {tensor.dtype}"]
    # A head may have as many outputs as its task has classes; everything else has the shape of the base's.
    if tuple(tensor.shape) != entry.shape and not (is_whole and _has_classes(adapter)):
        return [
            f"shape of {name}: {tuple(tensor.shape)} in the adapter, {entry.shape} in the base; where the "
            "vocabulary has grown, resize the base and save it first"
        ]
    result.replaced[there] = tensor
    return []


def _place_factors(
    result: Placement, adapter: Adapter, base: Checkpoint, path: str, factors: Factors
) -> list[str]:
    if factors.kind == "parameter":
        return [
            f"{path}: updates of parameters (target_parameters) are not merged on disk; merge it in memory"
        ]
    if factors.bias is not None:
        return [f"{path}: the bias on its B (lora_bias) goes into another tensor; merge it in memory"]
    if factors.magnitude is not None:
        return [f"{path}: its magnitudes (DoRA) scale whole rows and columns; merge it in memory"]
    there, rows = result.names.to_file(path), factors.B.shape[0]
    if name := whole(there, base.home):
        entry = base.entry(name)
        transposed = _is_transposed(adapter, base, path, factors, entry)
        return _add(result, base, name, Update(path, 0, (entry.shape or (0,))[0], factors, transposed))
    if members := split(there, base.home):
        sizes = [base.entry(name).shape[0] for name in members]
        if sum(sizes) != rows:
            return [f"shape of {path}: B has {rows} rows, {' + '.join(members)} have {sum(sizes)}"]
        problems = []
        for name, B in zip(members, factors.B.split(sizes), strict=True):
            part = Factors(factors.A, B, factors.scale, factors.kind)
            problems += _add(result, base, name, Update(name.removesuffix(".weight"), 0, B.shape[0], part))
        return problems
    if name := fused(there, base.home):
        own = fused_rows(there, rows, base.entry(name).shape[0])
        if own is None:
            return [f"shape of {path}: {rows} rows are no part of the {base.entry(name).shape[0]} of {name}"]
        return _add(result, base, name, Update(path, *own, factors))
    stems = {name.rpartition(".")[0] for name in base.home}
    return [f"unexpected: {path} is not in the base{nearest(there, stems, limit=1)}"]


def _add(result: Placement, base: Checkpoint, name: str, update: Update) -> list[str]:
    entry = base.entry(name)
    have = (update.stop - update.start, *entry.shape[1:])
    others = result.updates.setdefault(name, [])
    overlapping = next((u for u in others if u.start < update.stop and update.start < u.stop), None)
    if entry.dtype not in DTYPES:
        return [
            f"dtype of {update.label}: {name} is stored as {entry.dtype}, so it is quantized; merge into the "
            "base that was quantized"
        ]
    if have != update.shape:
        return [f"shape of {update.label}: the update's is {update.shape}, the base's {have} ({name})"]
    if overlapping:
        return [f"{update.label} and {overlapping.label}: both are {name} in the base"]
    others.append(update)
    others.sort(key=lambda u: u.start)
    return []


def _is_transposed(adapter: Adapter, base: Checkpoint, path: str, factors: Factors, entry: Entry) -> bool:
    """Whether the weight is stored (d_in, d_out): by its shape or, if square, by the architecture."""
    if factors.kind != "linear":
        return factors.kind == "embedding"
    d_out, d_in = factors.B.shape[0], factors.A.shape[1]
    if d_out != d_in:
        return entry.shape == (d_in, d_out)
    model = base.config.get("model_type")
    if model is None:
        return adapter.lora.fan_in_fan_out
    return path.rpartition(".")[2] in _CONV1D.get(str(model), ())


def _missing(result: Placement, adapter: Adapter, base: Checkpoint) -> list[str]:
    """Lists modules that the configuration trains whole and the adapter lacks."""
    return [
        f"missing: {name}, though the adapter says that it was trained whole"
        for name in base.home
        if name not in result.replaced and trained_whole(adapter, name)
    ]


def _still_one(result: Placement, tie: Tie, head: Update | None) -> bool:
    """Whether the head and its table stay equal, as `ensure_weight_tying` keeps them."""
    table = tie.table or ""
    updates = result.updates.get(table, []), [head] if head else result.updates.get(tie.head, [])
    whole = (
        result.replaced.get(table),
        (result.replaced if tie.stored else result.added).get(tie.head),
    )
    one, other = whole
    if one is not None or other is not None:
        if one is None or other is None or one.shape != other.shape or any(updates):
            return False
        return torch.equal(one, other)
    return all(len(each) == 1 for each in updates) and updates[1][0].factors.shares(updates[0][0].factors)


def _tie_problems(base: Checkpoint, tie: Tie, head: Update | None) -> list[str]:
    if tie.table is None:
        return [
            f"{tie.head}: the base ties it to its input embeddings, and it is not known by which names "
            f"{base.config.get('architectures')} keeps them apart; merge it in memory"
        ]
    shape = base.entry(tie.table).shape
    if head and head.shape != shape:
        return [f"shape of {head.label}: the update's is {head.shape}, its weight {tie.table} has {shape}"]
    return []


def trained_whole(adapter: Adapter, name: str) -> bool:
    """Whether a tensor belongs to a module that the adapter's configuration trains whole."""
    owner = f".{name.rpartition('.')[0]}."
    return any(f".{module}." in owner for module in adapter.config.modules_to_save or [])


def _has_classes(adapter: Adapter) -> bool:
    return adapter.config.task_type in ("SEQ_CLS", "TOKEN_CLS")
