from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from study import made

from lorica import Factors, study
from lorica.checkpoint import loralib
from lorica.errors import AdapterError, ConfigError


def only(f: Factors) -> study.Spectrum:
    return study.spectrum(made.adapter({"a": f})).layers["a"]


@given(
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
    r=st.integers(1, 15),
    scale=st.sampled_from([-1.5, 0.25, 2.0]),
)
def test_against_the_product(d_out: int, d_in: int, r: int, scale: float) -> None:
    """Ranks above the layer's sides included."""
    f = made.gaussian(d_out, d_in, r, scale=scale)
    found, expected = only(f), torch.linalg.svdvals(made.dense(f))
    values = torch.tensor(found.values, dtype=torch.float64)
    common = min(len(values), len(expected))
    torch.testing.assert_close(values[:common], expected[:common], rtol=1e-9, atol=1e-9)
    assert values[common:].sum() + expected[common:].sum() < 1e-9
    shares = expected.square() / expected.square().sum()
    entropy = -torch.xlogy(shares, shares).sum()
    assert found.effective_rank == pytest.approx(float(entropy.exp()), rel=1e-6)
    assert found.stable_rank == pytest.approx(float(expected.square().sum() / expected[0] ** 2))
    assert found.norm == pytest.approx(float(made.dense(f).norm()))
    assert (found.shape, found.r) == ((d_out, d_in), r)


def test_planted() -> None:
    found = only(made.planted(made.columns(20, 3, 0), [3, 1, 0], made.columns(30, 3, 1), scale=4))
    assert found.values == pytest.approx((3, 1, 0), abs=1e-9)
    assert found.energy == pytest.approx((0.9, 1, 1))
    assert [found.needed(e) for e in (0.5, 0.89, 0.91, 0.99, 1)] == [1, 1, 2, 2, 2]
    found = only(made.planted(made.columns(20, 4, 0), [2] * 4, made.columns(30, 4, 1)))
    assert (found.effective_rank, found.stable_rank, found.needed()) == pytest.approx((4, 4, 4))


def test_untrained() -> None:
    found = only(Factors(torch.randn(3, 5), torch.zeros(4, 3), 1.0))
    assert (found.norm, found.effective_rank, found.stable_rank, found.needed()) == (0, 0, 0, 0)
    assert found.values == (0, 0, 0)


def test_convolution_in_groups() -> None:
    """Its values are those of the dense block of each group."""
    A, B = torch.randn(6, 5, 3, 3), torch.randn(8, 3, 1, 1)  # two groups of rank 3
    found = only(Factors(A, B, 1.0, "conv"))
    blocks = [B[4 * g : 4 * g + 4].flatten(1) @ A[3 * g : 3 * g + 3].flatten(1) for g in range(2)]
    expected = torch.cat([torch.linalg.svdvals(block)[:3] for block in blocks]).sort(descending=True).values
    torch.testing.assert_close(torch.tensor(found.values), expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (8, 90)


def test_the_released_roberta_adapter(data_dir: Path) -> None:
    """Effective ranks of the paper's own MNLI adapter, as measured from its dense products."""
    report = study.spectrum(loralib.read(data_dir / "roberta_base_lora_mnli.bin", 16))
    expected = {
        "query": [3.1, 4.7, 5.2, 4.9, 6.2, 5.5, 4.9, 3.0, 2.9, 1.9, 1.3, 1.0],
        "value": [6.6, 5.6, 5.9, 5.8, 6.2, 6.1, 6.3, 6.3, 3.1, 4.0, 4.0, 2.9],
    }
    for name, ranks in expected.items():
        found = [s.effective_rank for path, s in report.layers.items() if path.endswith(name)]
        assert found == pytest.approx(ranks, abs=0.06)
    last = report.layers["roberta.encoder.layer.11.attention.self.query"]
    assert last.energy[0] > 0.99
    assert last.needed(0.99) == 1


def test_as_plain_values() -> None:
    report = study.spectrum(made.adapter({"h.0.q": made.gaussian(6, 5, 2)}))
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["layers"]["h.0.q"]["r"] == 2
    assert plain["layers"]["h.0.q"]["values"] == list(report.layers["h.0.q"].values)
    assert "h.0.q" in str(report)


@pytest.mark.parametrize("energy", [0, -1, 1.01, math.nan])
def test_no_share(energy: float) -> None:
    with pytest.raises(ConfigError, match="energy must be a share"):
        only(made.gaussian(4, 4, 2)).needed(energy)


def test_what_is_no_number_is_named() -> None:
    f = made.gaussian(8, 6, 2)
    f.B[0, 0] = math.nan
    for study_it in (study.spectrum, study.advise, study.gather, study.correlation):
        with pytest.raises(AdapterError, match=r"h\.0\.q: B holds NaN or infinity"):
            study_it(made.adapter({"h.0.q": f}))
