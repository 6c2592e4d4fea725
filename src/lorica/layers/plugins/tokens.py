"""Rows of an embedding that are trained by themselves (`trainable_token_indices`), such as new tokens'.

    ids ──▶ W0[ids], but of a trained token its own row          head tied to it: x·W0ᵀ, likewise

The rows are values, not differences. They start as W0's own, so an embedding that was resized with other
random rows gives the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from lorica.folding import check_finite
from lorica.layers.plugins.ecosystem import AskedModule, base_of, fallback_property


class TokenRows(nn.Module):
    """Trained rows of one table, per adapter.

    Attributes:
        trainable_tokens_delta: adapter name → rows (tokens, dim); the same parameter in each tied module.
        indices: adapter name → the tokens.
        tied: adapters whose rows belong to another module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.ParameterDict()
        self.indices: dict[str, tuple[int, ...]] = {}
        self.tied: set[str] = set()

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Adapter name → the tokens, under PEFT's name."""
        return {name: list(tokens) for name, tokens in self.indices.items()}


class TrainedTokens(AskedModule):
    """An embedding, or a linear head, some of whose rows are trained; acting adapters share no row."""

    label: ClassVar[str] = "Tokens"
    own_modules = ("token_adapter",)
    in_whole: ClassVar[str] = "another adapter trains rows of it (trainable_token_indices)"

    token_adapter: TokenRows

    @classmethod
    def refusal(cls) -> str:  # noqa: D102
        return (
            ": another adapter trains rows of it (trainable_token_indices), so it cannot take a low-rank "
            "update beside that"
        )

    def _chosen(self) -> list[str]:
        return [name for name in self._chosen_by_all() if name in self.token_adapter.indices]

    @fallback_property
    def original_module(self) -> nn.Module:
        """The original table."""
        return base_of(self)

    def prepare(self) -> None:  # noqa: D102
        self.token_adapter = TokenRows()

    def add_rows(self, name: str, indices: Sequence[int], rows: Parameter, *, tied: bool) -> None:
        """Add an adapter's rows.

        Args:
            name: the adapter's name.
            indices: indices of the rows in the table.
            rows: (tokens, dim).
            tied: whether they belong to another module, which saves them.
        """
        own = self.token_adapter
        own.trainable_tokens_delta[name], own.indices[name] = rows, tuple(indices)
        if tied:
            own.tied.add(name)

    def remove_rows(self, name: str) -> None:
        """Remove an adapter's rows."""
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
        """W0 with the acting rows, for code that reads the weight without calling the module."""
        sharded: Any = self.shard_of("weight")
        return self.with_rows(self._acting()) if sharded is None else sharded

    def with_rows(self, names: Sequence[str]) -> Tensor:
        """W0 with the adapters' rows, rounded to its dtype; differentiable."""
        W0 = self.base_weight
        return W0.index_copy(0, self._index(names), self._rows(names).to(W0.dtype)) if names else W0

    def merged_values(  # noqa: D102
        self, path: str, names: Sequence[str], shared: dict[Any, Parameter]
    ) -> dict[str, Parameter]:
        own = [name for name in names if name in self.adapters]
        if not own:
            return {}
        rows = [self.token_adapter.trainable_tokens_delta[name] for name in own]
        key = self.base_weight, *rows
        if key not in shared:
            for each in rows:
                check_finite(path, "rows", each.to(self.base_weight.dtype))
            shared[key] = Parameter(self.with_rows(own).detach(), requires_grad=False)
        return {"weight": shared[key]}

    def forward(self, input: Tensor) -> Tensor:
        """Apply the table to ids, or the head to ``(..., dim)``."""
        rows = self.adapter_state.rows
        if rows is None:
            return self._apply_rows(self._acting(), input)
        return rows.call(
            self, self.adapters, lambda name, x: self._apply_rows(() if name is None else (name,), x), input
        )

    def _acting(self) -> list[str]:
        return [name for name in self.adapter_state.active if name in self.token_adapter.indices]

    def _index(self, names: Sequence[str]) -> Tensor:
        """The adapters' tokens, one adapter after another."""
        indices = [index for name in names for index in self.token_adapter.indices[name]]
        return torch.tensor(indices, device=self.base_weight.device)

    def _rows(self, names: Sequence[str]) -> Tensor:
        """Their rows, in the same order (tokens, dim)."""
        rows = [self.token_adapter.trainable_tokens_delta[name] for name in names]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _apply_rows(self, names: Sequence[str], x: Tensor) -> Tensor:
        return self._logits(names, x) if isinstance(self, nn.Linear) else self._look_up(names, x)

    def _look_up(self, names: Sequence[str], ids: Tensor) -> Tensor:
        padding: int | None = self.padding_idx  # type: ignore[assignment]
        found = F.embedding(ids, self.base_weight, padding)
        if names:
            index = self._index(names)
            tokens, order = index.sort()
            near = torch.searchsorted(tokens, ids.contiguous()).clamp(max=len(tokens) - 1)
            hit = tokens[near] == ids
            if padding is not None:
                # As in the whole table, looking up the padding token does not train it.
                still = (index == padding).nonzero().flatten().tolist()
                padding = still[0] if still else None
            rows = self._rows(names).to(found.dtype)
            if self.scale_grad_by_freq:  # the others must not be counted
                own = F.embedding(order[near][hit], rows, padding, scale_grad_by_freq=True)
                found = found.masked_scatter(hit.unsqueeze(-1), own)
            else:
                found = torch.where(hit.unsqueeze(-1), F.embedding(order[near], rows, padding), found)
        scale: Any = getattr(self, "embed_scale", None)
        if isinstance(scale, Tensor):
            scale = scale.to(found.dtype)
        return found if scale is None else found * scale

    def _logits(self, names: Sequence[str], x: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        logits = F.linear(x, self.base_weight, bias)
        if not names:
            return logits
        index, rows = self._index(names), self._rows(names).to(x.dtype)
        own = F.linear(x, rows, None if bias is None else bias[index])
        return logits.index_copy_(-1, index, own.to(logits.dtype))
