"""Rows of an embedding that are trained by themselves (`trainable_token_indices`), such as new tokens'.

    ids ──▶ W0[ids], but of a trained token its own row          head tied to it: x·W0ᵀ, likewise

The rows are values, not differences: W0's own at the start, and an embedding resized with random rows after
that gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from lorica.layers.ecosystem import AskedModule, base_of, told


class TokenRows(nn.Module):
    """Trained rows of one table, for each adapter.

    Attributes:
        trainable_tokens_delta: adapter name → rows (tokens, dim); the same parameter in each tied module.
        indices: adapter name → the tokens.
        tied: adapters whose rows are another module's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.ParameterDict()
        self.indices: dict[str, tuple[int, ...]] = {}
        self.tied: set[str] = set()

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Adapter name → the tokens, as other libraries ask for them."""
        return {name: list(tokens) for name, tokens in self.indices.items()}


class TrainedTokens(AskedModule):
    """An embedding, or a linear head, some of whose rows are trained; one adapter's act at a time."""

    label: ClassVar[str] = "Tokens"
    own_modules = ("token_adapter",)

    token_adapter: TokenRows

    @told
    def original_module(self) -> nn.Module:
        """The table as it was before any adapter."""
        return base_of(self)

    def prepare(self) -> None:  # noqa: D102
        self.token_adapter = TokenRows()

    def add_rows(self, name: str, indices: Sequence[int], rows: Parameter, *, tied: bool) -> None:
        """Take an adapter's rows.

        Args:
            name: of the adapter.
            indices: which rows of the table.
            rows: (tokens, dim).
            tied: whether they are another module's, which saves them.
        """
        own = self.token_adapter
        own.trainable_tokens_delta[name], own.indices[name] = rows, tuple(indices)
        if tied:
            own.tied.add(name)

    def remove_rows(self, name: str) -> None:
        """Drop the adapter's rows."""
        own = self.token_adapter
        del own.trainable_tokens_delta[name], own.indices[name]
        own.tied.discard(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that have rows here."""
        return list(self.token_adapter.indices)

    @property
    def base_weight(self) -> Parameter:
        """W0."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:
        """W0 with the acting rows in their places, for whoever reads it without calling the module."""
        name = self._acting()
        return self.base_weight if name is None else self.with_rows(name)

    def with_rows(self, name: str) -> Tensor:
        """W0 with an adapter's rows in their places, rounded to its dtype; differentiable."""
        W0, rows = self.base_weight, self.token_adapter.trainable_tokens_delta[name]
        return W0.index_copy(0, self._index(name), rows.to(W0.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the table to ids, or the head to ``(..., dim)``."""
        rows = self.roster.rows
        if rows is None:
            return self._apply_rows(self._acting(), input)
        parts, places = [], []
        for name, index in rows.groups(self, input, self.adapters):
            parts.append(self._apply_rows(name, input.index_select(0, index)))
            places.append(index)
        return torch.cat(parts).index_select(0, torch.cat(places).argsort())

    def _acting(self) -> str | None:
        # There is one at most: the roster lets no two act that bring rows of the same module.
        return next((name for name in self.roster.active if name in self.token_adapter.indices), None)

    def _index(self, name: str) -> Tensor:
        return torch.tensor(self.token_adapter.indices[name], device=self.base_weight.device)

    def _apply_rows(self, name: str | None, x: Tensor) -> Tensor:
        return self._logits(name, x) if isinstance(self, nn.Linear) else self._look_up(name, x)

    def _look_up(self, name: str | None, ids: Tensor) -> Tensor:
        padding: int | None = self.padding_idx  # type: ignore[assignment]
        found = F.embedding(ids, self.base_weight, padding)
        if name is not None:
            tokens, order = self._index(name).sort()
            near = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
            hit = tokens[near] == ids
            if padding is not None:
                # As in the whole table, looking up the padding token does not train it.
                still = (self._index(name) == padding).nonzero().flatten().tolist()
                padding = still[0] if still else None
            rows = self.token_adapter.trainable_tokens_delta[name].to(found.dtype)
            found = torch.where(hit.unsqueeze(-1), F.embedding(order[near], rows, padding), found)
        scale: Any = getattr(self, "embed_scale", None)
        if isinstance(scale, Tensor):
            scale = scale.to(found.dtype)
        return found if scale is None else found * scale

    def _logits(self, name: str | None, x: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        logits = F.linear(x, self.base_weight, bias)
        if name is None:
            return logits
        index = self._index(name)
        rows = self.token_adapter.trainable_tokens_delta[name].to(x.dtype)
        own = F.linear(x, rows, None if bias is None else bias[index])
        return logits.index_copy_(-1, index, own.to(logits.dtype))
