from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorica
from lorica.errors import AdapterError
from lorica.export import even


def adapter(*, r: Any = 4, model: Any = None, **fields: Any) -> lorica.Adapter:
    """A random adapter of three linear layers."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Embedding(7, 4))
    settings: dict[str, Any] = {"target_modules": ["0", "1", "2"], "init_lora_weights": False, **fields}
    return lorica.extract(lorica.adapt(model, lorica.LoraConfig(r=r, **settings), seed=0))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"1": 2}, "alpha_pattern": {"0": 3}, "lora_alpha": 5},
        {"use_rslora": True, "rank_pattern": {"0": 7}},
        {"lora_bias": True, "lora_alpha": 3, "target_modules": ["0", "1"]},
        {"use_dora": True, "alpha_pattern": {"1": 1}, "target_modules": ["0", "1"]},
    ],
)
def test_the_same_outputs_from_one_rank_and_scale(fields: dict[str, Any]) -> None:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double()
    whole = adapter(**{**fields, "target_modules": ["0", "1"]})
    plain = even(whole)
    assert {f.r for f in plain.factors.values()} == {plain.lora.r}
    assert {f.scale for f in plain.factors.values()} == {1.0}
    assert (plain.lora.lora_alpha, plain.lora.rank_pattern, plain.lora.alpha_pattern) == (
        plain.lora.r,
        {},
        {},
    )
    assert not plain.lora.use_rslora
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        lorica.attach(base, whole, "whole")
        expected = base(x)
        lorica.attach(base, plain, "plain")
        with lorica.active(base, "plain"):
            torch.testing.assert_close(base(x), expected, rtol=1e-6, atol=1e-6)


def test_embeddings_and_what_cannot_be_padded() -> None:
    whole = adapter(rank_pattern={"2": 3}, lora_alpha=6)
    plain = even(whole).factors["2"]
    f = whole.factors["2"]
    torch.testing.assert_close(plain.B @ plain.A, f.scale * f.B @ f.A)
    grouped = adapter(model=nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), target_modules=["0"])
    with pytest.raises(AdapterError, match="0: the factors of a grouped convolution have no plain form"):
        even(grouped)
