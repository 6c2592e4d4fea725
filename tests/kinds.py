"""A small model for every kind of layer that can be adapted, and for torch's modules that read weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

DIM, ROWS = 6, 3


class Doubling(nn.Linear):
    """A layer with a forward of its own, to which updates are added."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1


class Conv1D(nn.Module):
    """transformers' Conv1D, imported where it is used."""

    def __new__(cls, *sizes: int) -> Any:
        return pytest.importorskip("transformers.pytorch_utils").Conv1D(*sizes)


class Kind(NamedTuple):
    """A model of one layer, or of torch's modules that read weights past it.

    Args:
        make: the model.
        x: its input.
        targets: modules to adapt.
        read: whether weights are read without calling their layers.
        decomposes: whether a start can be taken out of its weights.
        biases: whether there are any.
    """

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    targets: tuple[str, ...] = ("0",)
    read: bool = False
    decomposes: bool = True
    biases: bool = True


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(ROWS, *shape, dtype=torch.float64)


class SelfAttention(nn.Module):
    """Calls torch's attention as a model does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def encoder(**given: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(DIM, 2, 7, dropout=0.0, batch_first=True, **given)


def decoder() -> nn.Module:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(DIM, 2, 7, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, 0.5 * x)

    return Decoder()


KINDS = {
    "linear": Kind(lambda: nn.Sequential(nn.Linear(DIM, 7)), rows(4, DIM)),
    "linear without bias": Kind(
        lambda: nn.Sequential(nn.Linear(DIM, 5, bias=False)), rows(DIM), biases=False
    ),
    "two linears": Kind(
        lambda: nn.Sequential(nn.Linear(DIM, 7), nn.Tanh(), nn.Linear(7, 4)), rows(DIM), ("0", "2")
    ),
    "transformers' Conv1D": Kind(lambda: nn.Sequential(Conv1D(7, DIM)), rows(2, DIM)),
    "own forward": Kind(lambda: nn.Sequential(Doubling(DIM, 7)), rows(DIM), decomposes=False),
    "conv1d": Kind(
        lambda: nn.Sequential(nn.Conv1d(DIM, 4, 3, padding=1, padding_mode="circular")),
        rows(DIM, 5),
        decomposes=False,
    ),
    "conv2d": Kind(
        lambda: nn.Sequential(nn.Conv2d(DIM, 4, (2, 3), stride=2)), rows(DIM, 4, 5), decomposes=False
    ),
    "embedding": Kind(
        lambda: nn.Sequential(nn.Embedding(9, DIM)),
        lambda: torch.randint(0, 9, (ROWS, 4)),
        decomposes=False,
        biases=False,
    ),
    "attention": Kind(SelfAttention, rows(4, DIM), ("attention",), read=True),
    "attention's output": Kind(SelfAttention, rows(4, DIM), ("out_proj",), read=True),
    "encoder layer": Kind(encoder, rows(4, DIM), ("linear1", "linear2"), read=True),
    "encoder layer, all": Kind(
        lambda: encoder(norm_first=True), rows(4, DIM), ("self_attn", "linear1", "linear2"), read=True
    ),
    "encoder": Kind(
        lambda: nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False),
        rows(4, DIM),
        ("linear1", "linear2"),
        read=True,
    ),
    "decoder": Kind(decoder, rows(4, DIM), ("multihead_attn", "linear1", "linear2"), read=True),
}
