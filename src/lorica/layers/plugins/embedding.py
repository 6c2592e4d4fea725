"""Embedding tables."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from lorica import functional
from lorica.adapter import Kind
from lorica.errors import StateError, TargetError
from lorica.layers.base import LoraLayer
from lorica.layers.kinds import KINDS
from lorica.layers.variants import PLAIN
from lorica.tree import Place


class LoraEmbedding(LoraLayer):
    """An embedding: the row of a token, plus ``scale·B·A[:, token]``.

    An embedding is a linear layer on one-hot inputs, so dropping its input drops the whole update of a token.
    """

    own_modules = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    kind: ClassVar[Kind] = "embedding"
    transposed: ClassVar[bool] = True
    takes_bias: ClassVar[bool] = False
    padding_idx: int | None
    scale_grad_by_freq: bool
    max_norm: float | None
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict

    @classmethod
    def check_place(cls, place: Place) -> None:  # noqa: D102
        super().check_place(place)
        # An own forward may do no more than scale the rows that it looks up (Gemma's and BART's).
        own = getattr(place.module, "base_class", type(place.module)).forward is not nn.Embedding.forward
        if own and not hasattr(place.module, "embed_scale"):
            raise TargetError(
                f"{place.path} is a {type(place.module).__name__} with a forward of its own, which may look "
                "up other rows than it is given; lorica adapts embeddings that look up as nn.Embedding does"
            )

    def prepare(self) -> None:  # noqa: D102
        super().prepare()
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def factor_parameters(self, name: str) -> tuple[Parameter, Parameter]:  # noqa: D102
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    @classmethod
    def factor_names(cls, name: str) -> tuple[str, str]:  # noqa: D102
        return f"lora_embedding_A.{name}", f"lora_embedding_B.{name}"

    def add_factors(self, name: str, A: Parameter, B: Parameter, scale: float, dropout: float) -> None:  # noqa: D102
        self.lora_embedding_A[name], self.lora_embedding_B[name] = A, B
        self.scaling[name], self.lora_dropout[name], self.variants[name] = scale, dropout, PLAIN

    def update(self, name: str, x: Tensor) -> Tensor:
        """The update for token ids of any shape: one dimension more."""
        A, B, scale, p = self.update_of(name)
        rows = F.embedding(x, A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        if p > 0:
            rows = rows * functional.dropout(torch.ones_like(rows[..., :1]), p)
        # Gemma's embeddings multiply what they look up; the update is part of what is looked up.
        return rows @ B.t() * (scale * getattr(self, "embed_scale", 1.0))

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return F.embedding(x, weight, self.padding_idx) * getattr(self, "embed_scale", 1.0)

    def check_mergeable(self) -> None:
        """As `LoraLayer.check_mergeable`.

        Raises:
            StateError: the table rescales its rows as it looks them up, and would rescale the sum.
        """
        if self.max_norm is not None:
            raise StateError(
                f"max_norm={self.max_norm:g} holds the rows of W0 to that norm, and the update is added to "
                "them; merged, it would hold their sum to it. Use the adapter unmerged"
            )


KINDS[nn.Embedding] = LoraEmbedding
