"""DoRA against its definition: every output's weights keep a trained magnitude, B·A turns their direction."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
from lorica import LoraConfig, functional
from lorica.errors import AdapterError, TargetError
from lorica.layers import LoraLayer

CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 7), (3, 4, 5)),
    "linear without bias": (nn.Linear(5, 7, bias=False), (3, 5)),
    "conv1d": (nn.Conv1d(5, 6, 3, padding=1), (2, 5, 8)),
    "conv2d": (nn.Conv2d(3, 4, (2, 3), stride=2), (2, 3, 8, 9)),
}


def adapted(layer: nn.Module, *, shaken: bool = True, **settings: Any) -> tuple[nn.Module, Any]:
    """A model of one layer with DoRA on it, and that layer."""
    model = nn.Sequential(copy.deepcopy(layer))
    lorica.adapt(
        model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True, **settings), seed=1
    )
    host = model[0]
    assert isinstance(host, LoraLayer)
    if shaken:
        with torch.no_grad():
            for parameter in parameters(host):
                parameter.add_(0.4 * torch.randn_like(parameter))
    return model, host


def parameters(host: LoraLayer, name: str = "default") -> list[Tensor]:
    magnitude = host.magnitude_parameter(name)
    assert magnitude is not None
    return [*host.factor_parameters(name), magnitude]


def weight(host: LoraLayer, name: str = "default") -> Tensor:
    """``m ⊙ V / ‖V‖`` with V = W0 + scale·B·A, the norm taken as a constant (Liu et al., 2024, §4.3)."""
    A, B, magnitude = parameters(host, name)
    V = host.base_weight.flatten(1) + host.scaling[name] * B.flatten(1) @ A.flatten(1)
    return (magnitude[:, None] * V / V.norm(dim=1, keepdim=True).detach()).view(host.base_weight.shape)


def reference(layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
    return torch.func.functional_call(copy.deepcopy(layer), {"weight": W}, x)


@pytest.mark.parametrize("case", CASES)
def test_starts_as_the_base(case: str) -> None:
    layer, shape = CASES[case]
    x = torch.randn(shape)
    model, _ = adapted(layer, shaken=False)
    torch.testing.assert_close(model(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("widths", [(64, 48), (1000, 1000)])
def test_starts_as_the_base_in_every_bit_whatever_the_kernel_rounds(widths: tuple[int, int]) -> None:
    layer = nn.Linear(*widths)
    x = torch.rand(10, widths[0])
    model, _ = adapted(layer, shaken=False)
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_of_the_definition(case: str) -> None:
    layer, shape = CASES[case]
    x = torch.randn(shape, requires_grad=True)
    model, host = adapted(layer)
    y, expected = model(x), reference(layer, x, weight(host))
    assert not torch.allclose(y, layer(x), atol=1e-2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    along = torch.randn_like(y)
    asked = [x, *parameters(host)]
    got, want = (torch.autograd.grad(out, asked, along) for out in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_row_of_zeros(case: str) -> None:
    layer, shape = copy.deepcopy(CASES[case][0]), CASES[case][1]
    layer.get_parameter("weight").data[2] = 0
    x = torch.randn(shape, requires_grad=True)
    model, host = adapted(layer, shaken=False)
    y = model(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-6, atol=1e-6)
    along = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *parameters(host)], along)
    assert all(bool(gradient.isfinite().all()) for gradient in got)
    dB = got[2]
    assert bool(dB[2].any())  # the row learns a direction, and then a magnitude
    lorica.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    lorica.restore(model)
    with torch.no_grad():
        host.factor_parameters("default")[1].sub_(0.1 * dB)
    y = model(x)
    dm = torch.autograd.grad(y, parameters(host)[2], along)[0]
    assert bool(dm[2].abs() > 1e-3)
    assert lorica.merge(model).worst[1] < 1e-5
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_dropout_falls_on_the_low_rank_path_alone() -> None:
    model, host = adapted(nn.Linear(5, 7), lora_dropout=0.5)
    x = torch.randn(64, 5)
    model.train()
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    dropped = functional.dropout(x, 0.5)
    A, B, magnitude = parameters(host)
    V = host.base_weight + host.scaling["default"] * B @ A
    ratio = magnitude / V.norm(dim=1)
    expected = ratio * (x @ host.base_weight.T + host.scaling["default"] * dropped @ A.T @ B.T) + host.bias
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    r=st.integers(1, 5),
    scale=st.floats(0.1, 4),
    seed=st.integers(0, 99),
)
def test_row_norm_is_the_norm_of_the_rows(d_out: int, d_in: int, r: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    W, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((d_out, d_in), (r, d_in), (d_out, r)))
    torch.testing.assert_close(
        functional.row_norm(W, A, B, scale), (W + scale * B @ A).norm(dim=1), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_merged_and_restored(case: str) -> None:
    layer, shape = CASES[case]
    x = torch.randn(shape)
    model, host = adapted(layer)
    y, W0 = model(x), host.base_weight.clone()
    report = lorica.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert report.worst[1] < 1e-6
    lorica.restore(model)
    assert torch.equal(host.base_weight, W0)


def test_embedding() -> None:
    table = nn.Embedding(9, 4)
    model, host = adapted(table)
    tokens = torch.tensor([[0, 3, 8], [3, 3, 1]])
    A, B, magnitude = parameters(host)
    V = table.weight + host.scaling["default"] * (B @ A).T
    expected = F.embedding(tokens, magnitude * V / V.norm(dim=0))
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)


def test_beside_others_and_by_row() -> None:
    """Two adapters' effects add up; in a mixed batch each row has its own."""
    model, host = adapted(nn.Linear(5, 7))
    lorica.adapt(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False), "plain")
    lorica.adapt(
        model, LoraConfig(r=1, target_modules=["0"], init_lora_weights=False, use_dora=True), "other"
    )
    x, outputs = torch.randn(3, 5), {}
    with lorica.disabled(model):
        base = model(x)
    for name in ("default", "plain", "other"):
        with lorica.active(model, name):
            outputs[name] = model(x)
    with lorica.active(model, ["default", "plain", "other"]):
        torch.testing.assert_close(model(x), sum(outputs.values()) - 2 * base, rtol=1e-5, atol=1e-5)
        merged = lorica.merge(model)
        assert len(merged.layers) == 1
        torch.testing.assert_close(model(x), sum(outputs.values()) - 2 * base, rtol=1e-5, atol=1e-5)
        lorica.restore(model)
    for no_grad in (True, False):
        with torch.set_grad_enabled(not no_grad), lorica.mixed(model, ["default", "plain", None]):
            y = model(x)
        expected = torch.stack([outputs["default"][0], outputs["plain"][1], base[2]])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(host, LoraLayer)


def test_autocast_gives_its_own_dtype_beside_others_and_by_row() -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    for name in "ab":
        config = lorica.LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
        lorica.adapt(model, config, name)
    x = torch.randn(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        with lorica.active(model, ["a", "b"]):
            assert model(x).dtype == torch.bfloat16
        with lorica.mixed(model, ["b", "a"]):
            rows = model(x)
        for row, name in enumerate("ba"):
            with lorica.active(model, name):
                torch.testing.assert_close(rows[row], model(x)[row], rtol=0.05, atol=0.05)


def test_bfloat16_base_keeps_float32_magnitudes() -> None:
    layer = nn.Linear(64, 48).bfloat16()
    model, host = adapted(layer, shaken=False)
    x = torch.randn(5, 64).bfloat16()
    assert {p.dtype for p in parameters(host)} == {torch.float32}
    assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(model(x), layer(x), rtol=2e-2, atol=2e-2)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, host = adapted(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 6, 6)
    lorica.save(model, tmp_path / "dora")
    fresh = nn.Sequential(copy.deepcopy(CASES["conv2d"][0]), nn.Identity())
    with pytest.raises(AdapterError, match="shape of 0"):
        lorica.load(fresh, tmp_path / "dora")
    base = lorica.detach(copy.deepcopy(model))
    assert torch.equal(lorica.load(base, tmp_path / "dora")(x), model(x))
    assert host.magnitude_parameter("default") is not None


def test_a_grouped_convolution_is_refused() -> None:
    with pytest.raises(TargetError, match=r"0: in a grouped convolution"):
        adapted(nn.Conv1d(4, 4, 3, groups=2))


def test_a_file_without_its_magnitudes_is_refused(tmp_path: Any) -> None:
    model, _ = adapted(nn.Linear(5, 7))
    adapter = lorica.extract(model)
    plain = lorica.Adapter(
        adapter.config, {p: lorica.Factors(f.A, f.B, f.scale, f.kind) for p, f in adapter.factors.items()}
    )
    lorica.write(plain, tmp_path)
    with pytest.raises(AdapterError, match="lora_magnitude_vector is missing, though use_dora is set"):
        lorica.read(tmp_path)
