"""The addition of mounted adapters to one layer's output, by a forward hook, which leaves the layer as it is.

y  ──▶  y + (ratio − 1)·(y − b) + scale·B·A·x + shift      each token by its own adapter; or its copy's answer
        └─── DoRA ───┘            └─ tables ─┘   └ biases
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.errors import AdapterError
from lorica.layers.slots.plan import Group, Place, Plan, Run
from lorica.layers.slots.tables import Table, add_


@dataclass(frozen=True, slots=True)
class Packed:
    """The adapters of a packed batch.

    Args:
        tokens: on each token.
        heads: on each entry of what the output head is given, where that is not every token.
    """

    tokens: Plan
    heads: Plan | None = None

    @property
    def runs(self) -> tuple[tuple[Run, ...], tuple[Run, ...] | None]:
        """The adapter that it was made of."""
        return self.tokens.runs, None if self.heads is None else self.heads.runs


class Chosen(threading.local):
    """The batch of this thread; None for the layers as they are."""

    packed: Packed | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """An adapter's part at one layer, ready to be mounted: in the dtype and on the device of the layer.

    Args:
        A: (r, d_in); for an embedding (r, vocabulary). None where it has no update here.
        B: (r, d_out), times the scale, and with DoRA times the ratio.
        turn: with DoRA, the ratio of magnitude to norm, less 1 (d_out,).
        shift: what is added to the output: a bias on B, or a trained bias less the base's (d_out,).
        copy: answers in the layer's place.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    turn: Tensor | None = None
    shift: Tensor | None = None
    copy: nn.Module | None = None

    @property
    def finite(self) -> bool:
        """Whether every number is; what is cast or scaled may overflow."""
        own = (self.A, self.B, self.turn, self.shift)
        return all(bool(t.isfinite().all()) for t in own if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        copied = () if self.copy is None else self.copy.parameters()
        own = (self.A, self.B, self.turn, self.shift)
        return sum(t.nbytes for t in own if t is not None) + sum(p.nbytes for p in copied)


class OtherRows(nn.Module):
    """Answers as a table some of whose rows are others (`trainable_token_indices`), or the head tied to it.

    Args:
        module: the table or the head; its hooks are passed by.
        indices: which rows.
        rows: what they are (rows, width).
    """

    def __init__(self, module: nn.Module, indices: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows, requires_grad=False)
        self.indices = torch.tensor(indices, device=rows.device)
        self._base = (module,)

    def forward(self, x: Tensor) -> Tensor:
        """The table's rows for token ids, or the head's outputs for hidden states."""
        module: Any = self._base[0]
        y = module.forward(x)
        if not isinstance(module, nn.Embedding):
            own = F.linear(x, self.rows)
            bias = module._parameters.get("bias")
            y[..., self.indices] = own if bias is None else own + bias[self.indices]
            return y
        scale = getattr(module, "embed_scale", 1.0)
        for index, row in zip(self.indices.tolist(), self.rows, strict=True):
            y[x == index] = row * scale
        return y


@dataclass(eq=False)
class SlotLayer:
    """The mounted adapters at one layer, and the hook that applies them.

    Args:
        path: of the module.
        module: itself.
        chosen: what acts, by thread.
        head: whether it is the model's output head.
        like: a tensor with the dtype and device that it computes in.
    """

    path: str
    module: nn.Module
    chosen: Chosen
    head: bool
    like: Tensor
    held: set[Place] = field(default_factory=set)
    tables: dict[int, Table] = field(default_factory=dict)
    turns: dict[Place, Tensor] = field(default_factory=dict)
    shifts: dict[Place, Tensor] = field(default_factory=dict)
    copies: dict[Place, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._vectors: dict[str, tuple[Plan, Tensor]] = {}
        self._looked_up = isinstance(self.module, nn.Embedding)
        self._hook = self.module.register_forward_hook(self._after, with_kwargs=True)

    def __deepcopy__(self, memo: object) -> SlotLayer:
        """Itself: a copy of the module is another adapter's, and takes no hooks."""
        return self

    def close(self) -> None:
        """Leave the module."""
        self._hook.remove()

    def put(self, place: Place, part: Part) -> None:
        """Mount an adapter's part."""
        self.drop(place)
        self._vectors.clear()
        if part.A is not None and part.B is not None:
            if place.rank not in self.tables:
                self.tables[place.rank] = Table(place.rank, part.A.shape[1], part.B.shape[1], self.like)
            self.tables[place.rank].put(place.row, part.A, part.B)
        else:
            self.clear(place)
        for held, value in ((self.turns, part.turn), (self.shifts, part.shift), (self.copies, part.copy)):
            if value is not None:
                held[place] = value  # type: ignore[assignment]
        self.held.add(place)

    def drop(self, place: Place) -> None:
        """Unmount what a place holds."""
        if place not in self.held:
            return
        self.held.discard(place)
        self._vectors.clear()
        for held in (self.turns, self.shifts, self.copies):
            held.pop(place, None)
        if place.rank in self.tables:
            self.tables[place.rank].drop(place.row)

    def clear(self, place: Place) -> None:
        """Another adapter, without a part here, takes a place: nothing may be left of the one before it."""
        if place.rank in self.tables:
            self.tables[place.rank].clear(place.row)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor
    ) -> Tensor | None:
        packed = self.chosen.packed
        if packed is None:
            return None
        plan = packed.tokens if packed.heads is None or not self.head else packed.heads
        if self.held.isdisjoint(plan.places):
            return None
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        out = y.reshape(-1, y.shape[-1])
        rows = x.reshape(-1) if self._looked_up else x.reshape(-1, x.shape[-1])
        if len(rows) != plan.tokens:
            raise AdapterError(
                f"{self.path} sees {len(rows)} entries, and adapters were named for {plan.tokens} tokens; "
                "adapters on it cannot differ by token"
            )
        if torch.is_grad_enabled() or out.data_ptr() == x.data_ptr():
            out = out.clone()
        self._add_(out, rows, plan, module)
        return out.view(y.shape)

    def _add_(self, y: Tensor, x: Tensor, plan: Plan, module: nn.Module) -> None:
        if not self.turns.keys().isdisjoint(plan.places):
            bias = module._parameters.get("bias")
            turn = self._by_token("turn", self.turns, plan)
            y.addcmul_(turn, y if bias is None else y - bias)
        add = self._look_up_ if self._looked_up else self._multiply_
        for group in plan.groups:
            table = self.tables.get(group.rank)
            if table is not None and any(Place(group.rank, run.row) in self.held for run in group.runs):
                add(y, x, group, table)
        if not self.shifts.keys().isdisjoint(plan.places):
            y.add_(self._by_token("shift", self.shifts, plan))
        for place, twin in self.copies.items():
            if place in plan.places:
                index = plan.of(place)
                y.index_copy_(0, index, twin(x[index]).to(y.dtype))

    def _multiply_(self, y: Tensor, x: Tensor, group: Group, table: Table) -> None:
        if x.dtype == y.dtype == table.A.dtype:
            add_(y, x, group, table)
            return
        delta = torch.zeros_like(y, dtype=table.A.dtype)  # a packed layer computes in a dtype of its own
        add_(delta, x.to(delta.dtype), group, table)
        y.add_(delta)

    def _look_up_(self, y: Tensor, x: Tensor, group: Group, table: Table) -> None:
        for row, index in group.by_row():
            if row < len(table.A) and Place(group.rank, row) in self.held:
                u = F.embedding(x[index], table.A[row].t())
                y.index_add_(0, index, (u @ table.B[row]).to(y.dtype))

    def _by_token(self, name: str, held: Mapping[Place, Tensor], plan: Plan) -> Tensor:
        """A vector for each token, zeros where its adapter has none (tokens, d_out); kept for the plan."""
        found = self._vectors.get(name)
        if found is None or found[0] is not plan:
            vectors = self.like.new_zeros(plan.tokens, len(next(iter(held.values()))))
            for place, vector in held.items():
                if place in plan.places:
                    vectors[plan.of(place)] = vector
            found = self._vectors[name] = plan, vectors
        return found[1]
