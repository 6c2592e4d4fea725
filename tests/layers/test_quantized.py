"""Quantized layers: updates beside packed weights, against the same layer with its weight unpacked."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from packing import BITSANDBYTES, KINDS, NEEDED, quantized, state
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
from lorica import functional
from lorica.errors import LoricaWarning, StateError, TargetError
from lorica.layers import LoraOpaque, LoraQuantized
from lorica.layers.quantized import Quantizer, dequantize, holding, register, registry, requantize

kinds = pytest.mark.parametrize("kind", KINDS)


def linear(kind: str = "", d_in: int = 64, d_out: int = 48) -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(d_in, d_out)
    return quantized(layer, kind) if kind else layer


def adapted(layer: nn.Module, name: str = "default", **settings: Any) -> tuple[nn.Sequential, Any]:
    """A model of that layer, with a trained adapter on it, in training mode."""
    model = layer if isinstance(layer, nn.Sequential) else nn.Sequential(layer)
    usual: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["0"]}
    config = lorica.LoraConfig(**usual | settings)
    lorica.adapt(model, config, name, seed=3)
    draw = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in trained(model[0], name):
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model.train(), model[0]


def trained(layer: Any, name: str = "default") -> list[Tensor]:
    magnitude = layer.magnitude_parameter(name)
    return [*layer.factor_parameters(name), *([] if magnitude is None else [magnitude])]


def reference(layer: Any, x: Tensor, W0: Tensor, *names: str) -> Tensor:
    """The plain three lines, on the unpacked weight; DoRA's norm is a constant."""
    W = W0
    for name in names:
        A, B, *magnitude = trained(layer, name)
        V = W0 + layer.scaling[name] * B @ A
        W = W + (magnitude[0][:, None] * V / V.norm(dim=1, keepdim=True).detach() if magnitude else V) - W0
    return F.linear(x, W, layer.bias.to(x.dtype))


@kinds
class TestAgainstTheUnpackedWeight:
    @pytest.mark.parametrize("use_dora", [False, True])
    @pytest.mark.parametrize("leading", [(7,), (2, 5), (2, 0)])
    def test_output_and_gradients(self, kind: str, use_dora: bool, leading: tuple[int, ...]) -> None:
        base = linear(kind)
        W0 = dequantize(base)
        model, layer = adapted(base, use_dora=use_dora)
        assert isinstance(layer, LoraQuantized)
        assert isinstance(layer, nn.Linear)
        x = torch.randn(*leading, 64, requires_grad=True)
        y, expected = model(x), reference(layer, x, W0, "default")
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        along, asked = torch.randn_like(y), [x, *trained(layer)]
        got, want = (torch.autograd.grad(out, asked, along) for out in (y, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_several_adapters_and_a_mixed_batch(self, kind: str) -> None:
        base = linear(kind)
        W0 = dequantize(base)
        model, layer = adapted(base, "a")
        adapted(model, "bb", use_dora=True)
        x = torch.randn(3, 4, 64, requires_grad=True)
        asked = [x, *trained(layer, "a"), *trained(layer, "bb")]
        with lorica.active(model, ["a", "bb"]):
            y, expected = model(x), reference(layer, x, W0, "a", "bb")
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            got, want = (torch.autograd.grad(out.sum(), asked) for out in (y, expected))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        rows = [reference(layer, x[i], W0, *names) for i, names in enumerate((["bb"], [], ["a"]))]
        with lorica.mixed(model, ["bb", None, "a"]):
            y, expected = model(x), torch.stack(rows)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            got, want = (torch.autograd.grad(out.sum(), asked) for out in (y, expected))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_no_adapter_is_the_base_to_the_bit(self, kind: str) -> None:
        base = linear(kind)
        x = torch.randn(4, 64)
        before = copy.deepcopy(base).train()(x)
        model, _ = adapted(base)
        with lorica.disabled(model):
            assert torch.equal(model(x), before)

    def test_evaluation_adds_the_update_to_what_the_layer_itself_returns(self, kind: str) -> None:
        base = linear(kind)
        model, layer = adapted(base)
        x = torch.randn(4, 64)
        with torch.no_grad():
            model.eval()
            with lorica.disabled(model):
                own = model(x)
            A, B = trained(layer)
            torch.testing.assert_close(model(x), own + layer.scaling["default"] * (x @ A.T) @ B.T)

    def test_dora_starts_as_the_base(self, kind: str) -> None:
        base = linear(kind).train()
        x = torch.randn(4, 64)
        before = base(x)
        model = lorica.adapt(nn.Sequential(base), lorica.LoraConfig(target_modules=["0"], use_dora=True))
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)

    def test_dropout_falls_on_the_update_alone(self, kind: str) -> None:
        base = linear(kind)
        model, layer = adapted(base, lora_dropout=0.5)
        x = torch.randn(64, 64, requires_grad=True)
        with lorica.disabled(model):
            own = model(x)
        A, B = trained(layer)
        torch.manual_seed(5)
        y = model(x)
        torch.manual_seed(5)
        expected = own + layer.scaling["default"] * functional.dropout(x, 0.5) @ A.T @ B.T
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        got, want = (torch.autograd.grad(out.square().sum(), [x, A, B]) for out in (y, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)

    def test_a_trained_bias_gets_its_gradient(self, kind: str) -> None:
        base = linear(kind)
        W0 = dequantize(base)
        model, layer = adapted(base, bias="all", use_dora=True)
        assert layer.bias.requires_grad
        x = torch.randn(4, 64)
        y, expected = model(x), reference(layer, x, W0, "default")
        got, want = (torch.autograd.grad(out.square().sum(), layer.bias) for out in (y, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_lower_precision_and_autocast(self, kind: str) -> None:
        torch.manual_seed(1)
        base = quantized(nn.Linear(64, 48, dtype=torch.bfloat16), kind)
        W0 = dequantize(base)
        model, layer = adapted(base)
        A, B = trained(layer)
        assert A.dtype == B.dtype == torch.float32
        x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
        exact = reference(layer, x.float(), W0, "default")
        for y in (model(x), self.under_autocast(model, x)):
            assert y.dtype == torch.bfloat16
            assert (y.float() - exact).norm() < 0.02 * exact.norm()
            y.sum().backward()
            assert x.grad is not None
            assert A.grad is not None
            assert A.grad.dtype == torch.float32

    @staticmethod
    def under_autocast(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    def test_nothing_of_the_base_changes(self, kind: str) -> None:
        model = nn.Sequential(linear(kind))
        before, own = state(model), model[0].__dict__.keys()
        adapted(model, use_dora=True)
        for mode in (True, False):
            model.train(mode)(torch.randn(3, 64, requires_grad=mode)).sum().backward()
        kept = {key: value for key, value in state(model).items() if "lora_" not in key}
        assert kept == before
        lorica.detach(model)
        assert state(model) == before
        assert model[0].__dict__.keys() == own
        assert type(model[0]) is type(linear(kind))

    def test_pickles_and_copies(self, kind: str) -> None:
        model, _ = adapted(linear(kind))
        x = torch.randn(3, 64)
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        if kind in BITSANDBYTES:  # a layer of torchao's cannot be pickled, adapted or not
            assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)


@kinds
class TestUnpackingAndPacking:
    @pytest.mark.parametrize(("d_in", "d_out"), [(64, 48), (32, 7), (96, 5)])
    def test_some_rows_are_those_rows_of_all(self, kind: str, d_in: int, d_out: int) -> None:
        base = linear(kind, d_in, d_out)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            whole = dequantize(base, dtype=dtype)
            assert whole.shape == (d_out, d_in)
            assert whole.dtype == dtype
            for rows in (slice(0, 2), slice(1, 4), slice(3, None)):
                assert torch.equal(dequantize(base, rows, dtype), whole[rows])

    def test_unpacked_it_is_close_to_what_was_packed(self, kind: str) -> None:
        plain = linear()
        error = (dequantize(linear(kind)) - plain.weight).norm() / plain.weight.norm()
        bound = {"int8": 0.01, "ao int8": 0.01, "ao float8": 0.04}.get(kind, 0.15)
        assert 0 < error < bound

    def test_packed_again_it_is_the_same(self, kind: str) -> None:
        base = linear(kind)
        W0 = dequantize(base)
        before = state(base)
        with holding(base, requantize(base, W0)):
            again = dequantize(base)
            # From -8 to 7 there is no +8: with torchao the largest value becomes a fifteenth smaller.
            shrunk = {"ao int4": 0.07, "ao int8": 0.005}.get(kind, 1e-3)
            assert (again - W0).norm() < shrunk * W0.norm()
            x = torch.randn(2, 64)
            torch.testing.assert_close(base.train()(x), F.linear(x, again, base.bias), rtol=1e-4, atol=1e-4)
        assert state(base) == before

    def test_a_large_layer_is_measured_block_by_block(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = linear(kind)
        W0, A, B = dequantize(base), torch.randn(3, 64), torch.randn(48, 3)
        monkeypatch.setattr("lorica.layers.quantized.layer._BLOCK", 5 * 64)
        seen: list[Tensor] = []
        own = registry.dequantize
        monkeypatch.setattr(registry, "dequantize", lambda *args: seen.append(own(*args)) or seen[-1])
        norm = LoraQuantized.row_norm(base, A, B, 0.7)
        torch.testing.assert_close(norm, (W0 + 0.7 * B @ A).norm(dim=1), rtol=1e-5, atol=1e-5)
        assert max(len(block) for block in seen) == 5


class Halves(nn.Linear):
    """A weight in steps of a half, by someone else's library."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(x, self.weight.to(x.dtype) / 2, self.bias)


class HalvesQuantizer(Quantizer):
    def dequantize(self, module: nn.Module, rows: slice, dtype: torch.dtype) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight[rows].to(dtype) / 2

    def requantize(self, module: nn.Module, weight: Tensor) -> dict[str, Any]:
        return {"weight": nn.Parameter((weight * 2).round().to(torch.int8), requires_grad=False)}


def halves() -> Halves:
    layer = Halves(64, 48)
    layer.weight = nn.Parameter(torch.randint(-9, 9, (48, 64), dtype=torch.int8), requires_grad=False)
    return layer


class TestOtherLibraries:
    @pytest.mark.parametrize("by_name", [False, True])
    def test_one_that_is_registered(self, by_name: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "_QUANTIZERS", dict(registry._QUANTIZERS))
        assert isinstance(adapted(halves())[1], LoraOpaque)
        register(f"{__name__}.Halves" if by_name else Halves, HalvesQuantizer())
        try:
            base = halves()
            W0 = dequantize(base)
            model, layer = adapted(base, use_dora=True)
            x = torch.randn(5, 64)
            y = model(x)
            torch.testing.assert_close(y, reference(layer, x, W0, "default"), rtol=1e-5, atol=1e-4)
            report = lorica.merge(model, into="quantized")
            assert report.worst[1] > 0.1  # steps of a half swallow most of it
            lorica.restore(model)
            lorica.merge(model, into="dequantized")
            assert type(model[0]) is nn.Linear
            torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-4)
        finally:
            registry._registered.cache_clear()

    def test_one_that_only_says_that_it_is_linear(self) -> None:
        class Packed(nn.Module):  # as GPTQ's and AWQ's layers are
            def __init__(self) -> None:
                super().__init__()
                self.in_features, self.out_features, self.bias = 4, 3, None
                self.qweight = nn.Buffer(torch.randint(-3, 3, (3, 4), dtype=torch.int32))

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.qweight.to(x.dtype).T

        base = Packed()
        model, layer = adapted(base)
        assert isinstance(layer, LoraOpaque)
        x = torch.randn(5, 4, requires_grad=True)
        A, B = trained(layer)
        expected = x @ base.qweight.float().T + layer.scaling["default"] * x @ A.T @ B.T
        torch.testing.assert_close(model(x), expected)
        got, want = (torch.autograd.grad(y.sum(), [x, A, B]) for y in (model(x), expected))
        torch.testing.assert_close(got, want)
        with pytest.raises(StateError, match=r"0: a quantized Packed.*register"):
            lorica.merge(model)
        assert isinstance(model[0], LoraOpaque)
        with pytest.raises(TargetError, match="packs its weight in a way that lorica cannot read"):
            adapted(Packed(), use_dora=True)
        lorica.detach(model)
        assert type(model[0]) is Packed

    def test_a_plain_layer_has_nothing_to_unpack(self) -> None:
        with pytest.raises(StateError, match="Linear holds no weight that is packed"):
            dequantize(nn.Linear(2, 2))


class TestRefusals:
    @pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
    def test_a_layer_that_is_not_packed_yet(self, kind: str) -> None:
        bnb = pytest.importorskip("bitsandbytes", reason=NEEDED).nn
        options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
        model = nn.Sequential(getattr(bnb, kind)(64, 48, **options))
        with pytest.raises(TargetError, match=r"0 is a Linear.*moved to its device"):
            adapted(model)
        assert type(model[0]) is getattr(bnb, kind)
        adapted(model.to("cpu"))

    def test_a_packed_layer_cannot_be_trained_whole(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64), linear("nf4"))
        with pytest.raises(TargetError, match=r"1 cannot be trained whole.*quantized"):
            adapted(model, modules_to_save=["1"])
        assert type(model[0]) is nn.Linear


class TestLayoutOfTheCpu:
    """bitsandbytes repacks 4-bit layers in evaluation where the CPU has AVX512-BF16."""

    @pytest.fixture
    def base(self) -> nn.Linear:
        functional: Any = pytest.importorskip("bitsandbytes", reason=NEEDED).functional
        if not functional.has_avx512bf16():
            pytest.skip("needs a CPU with AVX512-BF16, where bitsandbytes changes the layout")
        return linear("nf4", 128, 64)

    def test_training_after_an_evaluation(self, base: nn.Linear) -> None:
        other = linear("nf4", 64, 32)
        model = nn.Sequential(base, other)
        before, W0 = state(model), [dequantize(layer) for layer in model]
        _, layer = adapted(model)
        with torch.no_grad():
            model.eval()(torch.randn(2, 128))
        assert {key: value for key, value in state(model).items() if "lora_" not in key} == before
        x = torch.randn(3, 128, requires_grad=True)
        expected = F.linear(reference(layer, x, W0[0], "default"), W0[1], other.bias)  # pyright: ignore
        y = model.train()(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        got, want = (torch.autograd.grad(out.sum(), [x, *trained(layer)]) for out in (y, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", ["nf4", "nf4 plain scales"])
    def test_one_that_was_evaluated_before(self, base: nn.Linear, kind: str) -> None:
        base = linear(kind, 128, 64)
        W0 = dequantize(base)
        with torch.no_grad():
            base.eval()(torch.randn(2, 128))
        assert base.weight.shape == (64, 64), "bitsandbytes no longer repacks: hold_layout can go"
        rounded = dequantize(base)
        assert 0 < (rounded - W0).norm() < 0.01 * W0.norm()
        with pytest.warns(LoricaWarning, match="1 4-bit layers were evaluated"):
            model, layer = adapted(base)
        torch.testing.assert_close(dequantize(layer), rounded, rtol=1e-2, atol=1e-3)
        x = torch.randn(3, 128, requires_grad=True)
        expected = reference(layer, x, dequantize(layer), "default")
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        lorica.detach(model)
        with torch.no_grad():
            model.eval()(torch.randn(2, 128))
        assert base.weight.shape == (64, 64)
