"""Find the tensor of each module in a checkpoint: names in files differ from those in a live model.

adapter                       file
model.layers.0.q_proj    ──▶  model.layers.0.q_proj.weight            as they are
model.layers.0.q_proj    ──▶  layers.0.q_proj.weight                  saved without a head
layers.0.q_proj          ──▶  model.layers.0.q_proj.weight            adapted without a head
model.visual.0.proj      ──▶  visual.0.proj.weight                    renamed by transformers
layers.0.q_proj          ──▶  rows 0:n of layers.0.qkv_proj.weight    fused on disk
layers.0.gate_up_proj    ──▶  layers.0.gate_proj.weight, ...up_proj   split on disk
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from lorica.errors import AdapterError, listing

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Modules whose weight is those of others, one under the other. (`query_key_value` goes by heads.)"""

# What transformers calls modules, and what these models' files, which are older than the names, have for it.
_RENAMED = (
    (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^lm_head\b", "language_model.lm_head"),
    ),
    ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
)

Rename = Callable[[str], str]


@dataclass(frozen=True)
class Names:
    """Translates an adapter's names to those of a file.

    Args:
        change: applied to names that the file does not have.
        prefix: the prefix that the file's names lack, because it was saved without the adapted model's head.
    """

    tensors: Collection[str]
    change: Rename
    prefix: str = ""

    def to_file(self, name: str) -> str:
        """The name that a tensor or module of the adapter has in the file, or would have."""
        return name if name in self.tensors or found(name, self.tensors) else self.change(name)

    def added(self, name: str) -> str:
        """The name in the merged checkpoint of a tensor that the file does not have."""
        return name if self.prefix else self.change(name)


def whole(path: str, tensors: Collection[str]) -> str | None:
    """The tensor that is the weight of the module at `path`."""
    return next((name for name in (f"{path}.weight", f"{path}.in_proj_weight") if name in tensors), None)


def split(path: str, tensors: Collection[str]) -> list[str]:
    """The tensors that, stacked, are the weight of the module at `path`."""
    parent, dot, leaf = path.rpartition(".")
    members = [f"{parent}{dot}{member}.weight" for member in FUSED.get(leaf, ())]
    return members if all(name in tensors for name in members) else []


def fused(path: str, tensors: Collection[str]) -> str | None:
    """The tensor in which some rows are the weight of the module at `path`."""
    parent, dot, leaf = path.rpartition(".")
    names = (f"{parent}{dot}{name}.weight" for name, members in FUSED.items() if leaf in members)
    return next((name for name in names if name in tensors), None)


def fused_rows(path: str, own: int, total: int) -> tuple[int, int] | None:
    """The rows of a fused tensor that belong to the module at `path`; k and v have equally many.

    Args:
        path: of the module.
        own: rows of its weight.
        total: rows of the fused tensor.

    Returns:
        The first and the one after the last; None where it cannot be.
    """
    start = {
        "q_proj": 0 if (total - own) % 2 == 0 else -1,
        "k_proj": total - 2 * own,
        "v_proj": total - own if total > 2 * own else -1,
        "gate_proj": 0 if total == 2 * own else -1,
        "up_proj": own if total == 2 * own else -1,
    }[path.rpartition(".")[2]]
    return (start, start + own) if start >= 0 and own < total else None


def found(path: str, tensors: Collection[str]) -> bool:
    """Whether there is a tensor for the module at `path`, under any arrangement."""
    return bool(whole(path, tensors) or split(path, tensors) or fused(path, tensors))


def match(modules: Sequence[str], tensors: Collection[str]) -> Names:
    """Find the change of names by which most of the modules that a file lacks are found in it.

    Args:
        modules: paths of the adapter's modules.
        tensors: names of the file's tensors.

    Returns:
        The change; none if every module is found unchanged, or no change helps.

    Raises:
        AdapterError: two changes fit equally well.
    """
    rest = [path for path in modules if not found(path, tensors)]
    fits: dict[tuple[str, ...], tuple[int, str, Names]] = {}
    for label, names in _changes(rest, tensors):
        renamed = tuple(map(names.change, rest))
        if count := sum(found(path, tensors) for path in renamed):
            fits.setdefault(renamed, (count, label, names))
    most = max((count for count, *_ in fits.values()), default=0)
    best = [(label, names) for count, label, names in fits.values() if count == most]
    if len(best) > 1:
        raise AdapterError(
            f"the adapter's names could mean several parts of the base: {rest[0]} may be meant "
            f"{listing(label for label, _ in best)}; give its modules the names they have in the whole model"
        )
    return best[0][1] if best else Names(tensors, str)


def _changes(rest: Sequence[str], tensors: Collection[str]) -> Iterator[tuple[str, Names]]:
    """Changes of names that may fit, and a label for each."""
    parts = [path.split(".") for path in rest]
    for prefix in dict.fromkeys(".".join(p[:i]) + "." for p in parts for i in range(1, min(3, len(p)))):
        yield f"without {prefix!r}", Names(tensors, lambda name, p=prefix: name.removeprefix(p), prefix)
    # All modules share a prefix, so a few are enough: there may be thousands of experts.
    parents = [path.rpartition(".")[0] for path in rest[:: len(rest) // 8 + 1]]
    for prefix in dict.fromkeys(
        name.partition(f".{parent}.")[0] + "."
        for parent in parents
        for name in tensors
        if parent and f".{parent}." in name
    ):
        yield f"under {prefix!r}", Names(tensors, lambda name, p=prefix: p + name)
    for family in _RENAMED:
        yield f"as {family[0][1]!r}", Names(tensors, lambda name, f=family: _first_change(f, name))


def _first_change(family: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, replacement in family:
        changed, count = re.subn(pattern, replacement, name)
        if count:
            return changed
    return name
