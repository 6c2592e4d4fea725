"""Embedding tables."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
from lorica.errors import StateError, TargetError
from lorica.functional import drop_rate
from lorica.layers import LoraEmbedding

TOKENS = torch.tensor([[3, 1, 0, 2], [9, 9, 5, 0]])


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[0], torch.tensor(4), TOKENS[:, :, None], TOKENS.int()])
def test_tokens_of_any_shape(tokens: Tensor) -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Embedding(10, 6)), "0")
    assert isinstance(model[0], LoraEmbedding)
    assert oracle.assert_as_folded(model, before, tokens).shape == (*tokens.shape, 6)


def test_no_tokens() -> None:
    model, _ = oracle.adapted(nn.Sequential(nn.Embedding(10, 6)), "0")
    assert model(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 6)


def test_it_computes_what_the_base_did_at_the_start() -> None:
    base = nn.Sequential(nn.Embedding(10, 6))
    expected = base(TOKENS)
    lorica.adapt(base, lorica.LoraConfig(target_modules=["0"]))
    assert torch.equal(base(TOKENS), expected)


def test_several_adapters_add_up() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Embedding(10, 6)), "0", name="a")
    oracle.adapted(model, "0", name="b", r=2)
    lorica.active(model, ["a", "b"])
    oracle.assert_as_folded(model, before, TOKENS, names=["a", "b"])


def test_the_padding_token_gets_no_gradient() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Embedding(10, 6, padding_idx=0)), "0")
    model(TOKENS).square().sum().backward()
    A, _ = model[0].factor_parameters("default")
    assert not A.grad[:, 0].any()
    assert A.grad[:, 3].any()
    weights = oracle.folded(model, before)
    torch.testing.assert_close(model(TOKENS), torch.func.functional_call(before, weights, TOKENS))


def test_gradients_are_scaled_by_frequency_as_the_whole_tables_are() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Embedding(10, 6, scale_grad_by_freq=True)), "0")
    ids = torch.tensor([[1, 1, 1, 2]])
    model(ids).sum().backward()
    A, B = model[0].factor_parameters("default")
    table = (before[0].weight + oracle.delta(model[0], "default")).detach().requires_grad_()
    F.embedding(ids, table, scale_grad_by_freq=True).sum().backward()
    torch.testing.assert_close(A.grad, model[0].scaling["default"] * (table.grad @ B).T)


def test_max_norm_bounds_the_bases_rows_as_before() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Embedding(10, 6, max_norm=0.5)), "0")
    delta = oracle.delta(model[0], "default")
    torch.testing.assert_close(model(TOKENS), before(TOKENS) + delta[TOKENS])
    assert torch.equal(model[0].base_weight, before[0].weight)


def test_bfloat16() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Embedding(10, 6, dtype=torch.bfloat16)), "0")
    y = model(TOKENS)
    assert y.dtype == torch.bfloat16
    exact = before(TOKENS).float() + oracle.delta(model[0], "default")[TOKENS]
    assert (y - exact).norm() < 0.01 * exact.norm()


class Scaled(nn.Embedding):
    """As in Gemma and BART: what is looked up is multiplied."""

    def __init__(self, scale: float | Tensor) -> None:
        super().__init__(10, 6)
        self.embed_scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)])
def test_a_table_that_scales_what_it_finds_scales_the_update_too(scale: float | Tensor) -> None:
    model, before = oracle.adapted(nn.Sequential(Scaled(scale)), "0")
    oracle.assert_as_folded(model, before, TOKENS)


class Shifted(nn.Embedding):
    """As OPT's positions: the rows it looks up are not those it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


def test_a_table_that_rescales_its_rows_is_not_merged() -> None:
    model, _ = oracle.adapted(nn.Sequential(nn.Embedding(10, 6, max_norm=1.0)), "0")
    y = model(TOKENS)
    with pytest.raises(StateError, match="0: max_norm=1 holds the rows of W0 to that norm"):
        lorica.merge(model)
    assert torch.equal(model(TOKENS), y)


def test_a_table_that_looks_up_other_rows_is_refused() -> None:
    with pytest.raises(
        TargetError, match="0 is a Shifted with a forward of its own, which may look up other rows"
    ):
        lorica.adapt(nn.Sequential(Shifted(10, 6)), lorica.LoraConfig(target_modules=["0"]))


def test_dropout_drops_the_whole_update_of_a_token() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Embedding(10, 6)), "0", lora_dropout=0.25)
    tokens = torch.randint(10, (4000,))
    update = model(tokens) - before(tokens)
    whole = oracle.delta(model[0], "default")[tokens] / (1 - drop_rate(0.25))
    kept = update.abs().amax(-1) > 1e-6
    torch.testing.assert_close(update[kept], whole[kept], rtol=1e-4, atol=1e-5)
    assert abs(kept.double().mean().item() - 0.75) < 0.03
    oracle.assert_as_folded(model.eval(), before, tokens)
