"""One adapter for each row: every row computes, and trains, what it would alone."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from tiny import shake
from torch import Tensor, nn

import lorica
from lorica.errors import AdapterError

NAMES = ("topics", None, "tone", "topics", "long", None)


class Doubling(nn.Linear):
    """Keeps its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Layers(nn.Module):
    """One of each kind that rows can share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.up = nn.Linear(8, 12)
        self.down = Doubling(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.down(torch.tanh(self.up(x))).mean(1))


@pytest.fixture
def model() -> Any:
    """Three adapters of different ranks and targets; "topics" has a head of its own."""
    model = Layers()
    oracle.adapted(model, "embed", "conv", "up", "down", name="topics", r=2, modules_to_save=["head"])
    shake(model)
    oracle.adapted(model, "up", "down", name="tone", r=3)
    oracle.adapted(model, "up", name="long", r=7)
    return model.eval()


def one_by_one(model: nn.Module, tokens: Tensor, names: tuple[str | None, ...]) -> Tensor:
    rows = []
    for row, name in zip(tokens, names, strict=True):
        with lorica.active(model, name or ()):
            rows.append(model(row[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "names", [NAMES, ("tone",) * 6, (None,) * 6, ("tone", "tone", "long", "long", "topics", "topics")]
)
def test_every_row_is_what_it_would_be_alone(model: Any, names: tuple[str | None, ...], grad: bool) -> None:
    tokens = torch.randint(20, (6, 5))
    with torch.set_grad_enabled(grad):
        expected = one_by_one(model, tokens, names)
        with lorica.mixed(model, names):
            torch.testing.assert_close(model(tokens), expected)
            torch.testing.assert_close(model(tokens), expected)
        assert not torch.allclose(expected, one_by_one(model, tokens, (None,) * 6)) or names == (None,) * 6


def test_every_row_trains_its_own_adapter(model: Any) -> None:
    tokens = torch.randint(20, (6, 5))
    weights = torch.randn(6, 3)
    trained = [p for p in model.parameters() if p.requires_grad]
    with lorica.mixed(model, NAMES):
        got = torch.autograd.grad((model(tokens) * weights).sum(), trained)
    expected = torch.autograd.grad((one_by_one(model, tokens, NAMES) * weights).sum(), trained)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_what_was_trained_meanwhile_is_seen(model: Any) -> None:
    tokens = torch.randint(20, (6, 5))
    with lorica.mixed(model, NAMES):
        with torch.no_grad():
            before = model(tokens)
        model(tokens).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.add_(torch.randn_like(parameter))
            after = model(tokens)
    assert not torch.allclose(before, after)
    with torch.no_grad():
        torch.testing.assert_close(after, one_by_one(model, tokens, NAMES))


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False])
def test_under_autocast_and_without(first: bool) -> None:
    model, _ = oracle.adapted(nn.Sequential(nn.Linear(5, 7)), "0", name="a")
    x = torch.randn(3, 5)
    with lorica.mixed(model, ["a", None, "a"]):
        for enabled in (first, not first):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = model(x)
                expected = torch.cat([model[0].base_forward(x[i : i + 1]) for i in range(3)])
            assert y.dtype == expected.dtype == (torch.bfloat16 if enabled else torch.float32)
            torch.testing.assert_close(y[1], expected[1])
            assert not torch.allclose(y[0], expected[0])


@pytest.mark.parametrize("length", [1, 4])
def test_one_token_or_several(length: int) -> None:
    model, _ = oracle.adapted(nn.Sequential(nn.Linear(8, 6)), "0", name="a", r=2)
    oracle.adapted(model, "0", name="b", r=3)
    x = torch.randn(3, length, 8)
    with torch.no_grad():
        with lorica.mixed(model, ["b", "a", None]):
            together = model(x)
        torch.testing.assert_close(together, one_by_one(model, x, ("b", "a", None)))


def test_a_number_of_rows_that_does_not_fit() -> None:
    model, _ = oracle.adapted(nn.Sequential(nn.Linear(8, 6)), "0", name="a")
    for rows in (3, 4):  # that many for each name would have to be beams, and nothing says so
        with (
            lorica.mixed(model, ["a", None]),
            pytest.raises(AdapterError, match=rf"2 adapters were named.*sees {rows} rows"),
        ):
            model(torch.randn(rows, 8))


def test_it_ends_with_the_block(model: Any) -> None:
    tokens = torch.randint(20, (6, 5))
    expected = model(tokens)
    with lorica.mixed(model, NAMES):
        assert not torch.allclose(model(tokens), expected)
    assert torch.equal(model(tokens), expected)
