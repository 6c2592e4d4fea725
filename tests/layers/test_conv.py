"""Convolutions."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorica
from lorica.errors import StateError, TargetError
from lorica.functional import drop_rate
from lorica.layers import LoraConv

SIZES = {nn.Conv1d: (9,), nn.Conv2d: (9, 8), nn.Conv3d: (6, 5, 7)}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2},
        {"padding": 1},
        {"dilation": 2},
        {"padding": "same"},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "stride": 2, "dilation": 2, "bias": False},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 2, "padding_mode": "reflect", "stride": 2},
        {"padding": "same", "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_stride_padding_and_dilation(kind: type[nn.Conv1d], settings: dict[str, Any]) -> None:
    model, before = oracle.adapted(nn.Sequential(kind(3, 5, 3, **settings)), "0")
    assert isinstance(model[0], LoraConv)
    oracle.assert_as_folded(model, before, torch.randn(2, 3, *SIZES[kind], requires_grad=True))


def test_settings_of_each_axis() -> None:
    base = nn.Sequential(nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)))
    model, before = oracle.adapted(base, "0")
    oracle.assert_as_folded(model, before, torch.randn(2, 3, 9, 8, requires_grad=True))


@pytest.mark.parametrize("kind", SIZES)
def test_one_example_without_a_batch(kind: type[nn.Conv1d]) -> None:
    model, before = oracle.adapted(nn.Sequential(kind(3, 5, 3)), "0")
    oracle.assert_as_folded(model, before, torch.randn(3, *SIZES[kind], requires_grad=True))


def test_several_adapters_add_up() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Conv2d(3, 5, 3)), "0", name="a")
    oracle.adapted(model, "0", name="b", r=2)
    lorica.active(model, ["a", "b"])
    oracle.assert_as_folded(model, before, torch.randn(2, 3, 6, 6), names=["a", "b"])


class TestGroups:
    def test_A_sees_all_channels_and_B_mixes_within_its_group(self) -> None:
        model, before = oracle.adapted(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), "0", r=4)
        A, B = model[0].factor_parameters("default")
        assert (A.shape, B.shape) == ((4, 4, 3), (6, 2, 1))
        x = torch.randn(2, 4, 9)
        u = F.conv1d(x, A)
        halves = [
            torch.einsum("or,nrl->nol", B[i * 3 : i * 3 + 3, :, 0], u[:, i * 2 : i * 2 + 2]) for i in (0, 1)
        ]
        torch.testing.assert_close(model(x), before(x) + 1.5 * torch.cat(halves, 1))

    def test_a_rank_that_the_groups_do_not_divide(self) -> None:
        with pytest.raises(
            TargetError, match=r"groups=2 and rank 3. Currently.* where the rank is divisible by groups"
        ):
            oracle.adapted(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), "0", r=3)

    def test_merging_is_refused_by_name(self) -> None:
        model, _ = oracle.adapted(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), "0")
        with pytest.raises(StateError, match="0: a convolution with 2 groups cannot be merged"):
            lorica.merge(model)
        assert isinstance(model[0], LoraConv)


def test_dropout_drops_inputs() -> None:
    model, before = oracle.adapted(
        nn.Sequential(nn.Conv1d(64, 64, 1)), "0", r=64, lora_alpha=64, lora_dropout=0.25
    )
    with torch.no_grad():
        for factor in model[0].factor_parameters("default"):
            factor.copy_(torch.eye(64)[..., None])
    x = torch.ones(1, 64, 50)
    update = model(x) - before(x)
    kept = update.abs() > 1e-4
    torch.testing.assert_close(update, kept / (1 - drop_rate(0.25)), rtol=1e-4, atol=1e-5)
    assert abs(kept.double().mean().item() - 0.75) < 0.04
    torch.testing.assert_close(model.eval()(x) - before(x), torch.ones_like(x))


def test_bfloat16() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Conv2d(3, 5, 3, dtype=torch.bfloat16)), "0")
    x = torch.randn(2, 3, 6, 6).bfloat16()
    y = model(x)
    assert y.dtype == torch.bfloat16
    weight, bias = oracle.folded(model, before)["0.weight"], before[0].bias
    exact = F.conv2d(x.float(), weight.float(), bias.float())
    assert (y - exact).norm() < 0.02 * exact.norm()
