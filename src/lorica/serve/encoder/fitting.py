"""An adapter made ready for a base that reads: its update of the trunk, and its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.adapter import Adapter
from lorica.errors import listing
from lorica.serve.encoder.base import Base
from lorica.serve.encoder.heads import TASKS, Head, Kind, make_head, updates_alone
from lorica.serve.engine import RefusedAdapter
from lorica.train.recipe import check_file
from lorica.train.run import RECIPE


@dataclass(frozen=True, eq=False)
class Fitted:
    """An adapter's parts for a base; nothing of it is on the model yet.

    Args:
        trunk: its update of the trunk; None where it is a head alone.
        head: its head; the base's own where it only changes vectors.
        rank: the largest of its updates'.
        total: modules that it has something for.
        nbytes: bytes of its tensors.
    """

    trunk: Adapter | None
    head: Head | None
    rank: int
    total: int
    nbytes: int

    @property
    def applied(self) -> int:
        """Modules that it acts on: all, or it would have been refused."""
        return self.total


def fit(base: Base, adapter: Adapter, folder: Path) -> Fitted:
    """Part an adapter into its update of the trunk and its head.

    Args:
        base: that it is for.
        adapter: as it was read.
        folder: its folder; a recipe in it names its task.

    Raises:
        LoricaError: it cannot be served so; the message says why.
    """
    adapter.lora  # noqa: B018 - refuses other methods by name
    adapter.check_finite()
    trunk, rest = _parted(adapter, base)
    if trunk is None and not (rest.factors or rest.extras):
        raise RefusedAdapter(f"none of its modules is in {base.name}")
    head = _head(rest, adapter, folder, base)
    rank = max((factors.r for factors in adapter.factors.values()), default=0)
    whole = {name.rpartition(".")[0] for name in adapter.extras}
    return Fitted(trunk, head, rank, len(adapter.factors) + len(whole), adapter.nbytes)


def _parted(adapter: Adapter, base: Base) -> tuple[Adapter | None, Adapter]:
    """An adapter's part for the trunk, by the trunk's own paths, and its part for a head."""
    paths = dict(base.model.named_modules())
    start = f"{base.prefix}."

    def own(name: str, module: str) -> str | None:
        """A name within the trunk; None for one of a head."""
        if name.startswith(start):
            return name[len(start) :]
        return name if module in paths else None

    factors = {path: own(path, path) for path in adapter.factors}
    extras = {name: own(name, name.rpartition(".")[0]) for name in adapter.extras}
    inner = {new: adapter.factors[path] for path, new in factors.items() if new is not None}
    whole = {new: adapter.extras[name] for name, new in extras.items() if new is not None}
    outer = {path: adapter.factors[path] for path, new in factors.items() if new is None}
    rest = {name: adapter.extras[name] for name, new in extras.items() if new is None}
    trunk = updates_alone(adapter, inner, whole) if inner or whole else None
    return trunk, Adapter(adapter.config, outer, rest, classes=adapter.classes)


def _head(part: Adapter, adapter: Adapter, folder: Path, base: Base) -> Head | None:
    """The head that an adapter brings, or that the base has for it."""
    if not (part.factors or part.extras):
        return base.own
    task, labels = _learned(folder)
    kind: Kind | None = TASKS.get(task or "")
    if kind is None and task is not None:
        raise RefusedAdapter(
            f"its task is {task}; beside a model that reads, these are served: {', '.join(TASKS)}"
        )
    outputs = [t.shape[0] for name, t in part.extras.items() if t.ndim == 2 and name.endswith("weight")]
    if not outputs:
        raise RefusedAdapter(
            f"it changes {listing(sorted(part.factors), limit=3)}, which {base.name} does not have, and "
            "brings no head"
        )
    if kind is None and adapter.config.task_type == "TOKEN_CLS":
        kind = "tags"
    names: Sequence[str] = labels or adapter.classes or ()
    count = len(names) or outputs[-1]
    kind = kind or ("number" if count == 1 else "classes")
    # A number that was learned as one is told as it is; that of a cross-encoder is a logit.
    raw = task == "regression" or base.config.problem_type == "regression"
    return make_head(
        base.config, kind, names or [f"LABEL_{i}" for i in range(count)], base.values(kind), part, raw=raw
    )


def _learned(folder: Path) -> tuple[str | None, Sequence[str] | None]:
    """The task and the labels that the recipe beside an adapter names."""
    if not (folder / RECIPE).is_file():
        return None, None
    recipe: Mapping[str, Any] = check_file(folder / RECIPE)
    return str(recipe.get("task") or "sequence-classification"), (recipe.get("data") or {}).get(
        "labels"
    ) or None
