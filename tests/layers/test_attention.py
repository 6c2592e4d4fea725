"""Torch's own attention and encoder, whose kernels read weights without calling the modules that hold them.

The reference is always the base with explicit weights W0 + scale·B·A, on the same path: training, evaluation,
evaluation without gradients (the fused kernels), nested tensors.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from tiny import shake
from torch import Tensor, nn
from torch.func import functional_call

import lorica
from lorica.errors import AdapterError, StateError, TargetError
from lorica.layers import LoraAttention, LoraAttentionOutput, LoraReadLinear

DIM, LENGTH = 8, 5
ENCODER = ("self_attn", "linear1", "linear2")


def padding() -> Tensor:
    """True where a token is padding: none, two, one."""
    return torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


FUSED = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused kernels that ran, in order."""
    calls: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        kernel = getattr(torch, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return kernel(*args, **kwargs)

        return call

    for name in FUSED:
        monkeypatch.setattr(torch, name, watched(name))
    return calls


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of the base."""
    return {name: t.detach().clone() for name, t in model.state_dict().items() if "lora_" not in name}


class TestMultiheadAttention:
    @staticmethod
    def attention(**settings: Any) -> tuple[Any, Any]:
        """An adapted attention and what it was before."""
        torch.manual_seed(0)
        base = nn.ModuleDict({"attention": nn.MultiheadAttention(DIM, 2, **settings)})
        model, before = oracle.adapted(base, "attention")
        assert isinstance(model["attention"], LoraAttention)
        assert isinstance(model["attention"].out_proj, LoraAttentionOutput)
        return model["attention"], before["attention"]

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    def test_self_attention(self, batch_first: bool, training: bool, bias: bool) -> None:
        attention, before = self.attention(batch_first=batch_first, bias=bias)
        attention.train(training)
        before.train(training)
        x = torch.randn(3, LENGTH, DIM, requires_grad=True)
        oracle.assert_as_folded(attention, before, x, x, x)

    @pytest.mark.parametrize("settings", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": 0.0}])
    def test_settings_of_its_own(self, settings: dict[str, Any]) -> None:
        attention, before = self.attention(**settings)
        x = torch.randn(3, LENGTH, DIM, requires_grad=True)
        oracle.assert_as_folded(attention, before, x, x, x)

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_masks_and_weights(self, need_weights: bool) -> None:
        attention, before = self.attention(batch_first=True)
        x = torch.randn(3, LENGTH, DIM, requires_grad=True)
        causal = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), diagonal=1)
        arguments: dict[str, Any] = {
            "attn_mask": causal,
            "key_padding_mask": padding(),
            "need_weights": need_weights,
        }
        oracle.assert_as_folded(attention, before, x, x, x, **arguments)
        weights = attention(x, x, x, **arguments)[1]
        expected = functional_call(before, oracle.folded(attention, before), (x, x, x), arguments)[1]
        torch.testing.assert_close(weights, expected)

    def test_cross_attention(self) -> None:
        attention, before = self.attention(batch_first=True)
        query, key, value = (torch.randn(3, length, DIM, requires_grad=True) for length in (LENGTH, 7, 7))
        oracle.assert_as_folded(attention, before, query, key, value)

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_the_fused_kernel(self, need_weights: bool, fused_calls: list[str]) -> None:
        attention, before = self.attention(batch_first=True)
        attention.eval()
        before.eval()
        x = torch.randn(3, LENGTH, DIM)
        with torch.no_grad():
            oracle.assert_as_folded(attention, before, x, x, x, need_weights=need_weights)
            fused_calls.clear()
            fast = attention(x, x, x, need_weights=need_weights)[0]
        assert fused_calls == ["_native_multi_head_attention"]
        torch.testing.assert_close(fast, attention(x, x, x)[0])

    def test_the_output_projection_alone(self) -> None:
        base = nn.ModuleDict({"attention": nn.MultiheadAttention(DIM, 2)})
        model, before = oracle.adapted(base, "out_proj")
        assert type(model["attention"]) is nn.MultiheadAttention
        x = torch.randn(LENGTH, 3, DIM, requires_grad=True)
        oracle.assert_as_folded(model["attention"], before["attention"], x, x, x)

    def test_several_adapters_add_up(self) -> None:
        base = nn.ModuleDict({"attention": nn.MultiheadAttention(DIM, 2)})
        model, before = oracle.adapted(base, "attention", name="a")
        oracle.adapted(model, "attention", name="b", r=2)
        lorica.active(model, ["a", "b"])
        x = torch.randn(LENGTH, 3, DIM, requires_grad=True)
        oracle.assert_as_folded(model["attention"], before["attention"], x, x, x, names=["a", "b"])

    def test_no_call_writes_to_the_bases_weights(self) -> None:
        attention, before = self.attention(batch_first=True)
        x = torch.randn(3, LENGTH, DIM)
        for training in (True, False):
            attention.train(training)
            attention(x, x, x)[0].sum().backward()
            with torch.no_grad():
                attention(x, x, x)
        assert all(torch.equal(t, weights_of(before)[name]) for name, t in weights_of(attention).items())
        assert attention._parameters["in_proj_weight"].grad is None

    def test_the_weight_it_shows_is_the_bases_own_where_no_adapter_acts(self) -> None:
        base = nn.ModuleDict({"attention": nn.MultiheadAttention(DIM, 2)})
        own = base["attention"].in_proj_weight
        model, _ = oracle.adapted(base, "attention")
        assert model["attention"].in_proj_weight is not own
        with lorica.disabled(model):
            assert model["attention"].in_proj_weight is own

    def test_bfloat16_is_rounded_once(self) -> None:
        base = nn.ModuleDict({"attention": nn.MultiheadAttention(DIM, 2, dtype=torch.bfloat16)})
        model, before = oracle.adapted(base, "attention")
        attention = model["attention"]
        delta = oracle.delta(attention, "default")
        expected = (before["attention"].in_proj_weight.float() + delta).bfloat16()
        torch.testing.assert_close(attention.in_proj_weight, expected, rtol=2**-8, atol=1e-6)
        assert attention.in_proj_weight.dtype == torch.bfloat16

    def test_separate_sizes_of_key_and_value_are_refused(self) -> None:
        base = nn.ModuleDict({"attention": nn.MultiheadAttention(DIM, 2, kdim=6, vdim=4)})
        with pytest.raises(
            TargetError,
            match="kdim or vdim of its own, and has no single weight to adapt; target its out_proj",
        ):
            oracle.adapted(base, "attention")

    def test_dropout_of_the_update_is_refused(self) -> None:
        base = nn.ModuleDict({"attention": nn.MultiheadAttention(DIM, 2)})
        with pytest.raises(TargetError, match="set lora_dropout=0"):
            oracle.adapted(base, "attention", lora_dropout=0.1)
        adapter = lorica.extract(oracle.adapted(copy.deepcopy(base), "attention")[0])
        adapter = dataclasses.replace(adapter, config=adapter.lora.replace(lora_dropout=0.1))
        with pytest.raises(AdapterError, match="set lora_dropout=0"):
            lorica.attach(base, adapter, trainable=True)
        lorica.attach(base, adapter)  # which trains no further


class TestEncoderLayer:
    @staticmethod
    def layer(**settings: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        base = nn.TransformerEncoderLayer(DIM, 2, 12, dropout=0.0, batch_first=True, **settings)
        model, before = oracle.adapted(base, *ENCODER)
        assert isinstance(model.linear1, LoraReadLinear)
        return model, before

    @pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"activation": "gelu"}])
    @pytest.mark.parametrize("training", [True, False])
    def test_with_gradients(self, training: bool, settings: dict[str, Any]) -> None:
        model, before = self.layer(**settings)
        x = torch.randn(3, LENGTH, DIM, requires_grad=True)
        oracle.assert_as_folded(
            model.train(training), before.train(training), x, src_key_padding_mask=padding()
        )

    @pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"activation": "gelu"}])
    def test_the_fused_kernel(self, settings: dict[str, Any], fused_calls: list[str]) -> None:
        model, before = self.layer(**settings)
        model.eval()
        x = torch.randn(3, LENGTH, DIM)
        with torch.no_grad():
            oracle.assert_as_folded(model, before.eval(), x)
            fused_calls.clear()
            fast = model(x)
        assert fused_calls == ["_transformer_encoder_layer_fwd"]
        torch.testing.assert_close(fast, model(x), rtol=1e-4, atol=1e-5)

    def test_disabled_it_is_the_base_on_every_path(self) -> None:
        model, before = self.layer()
        x = torch.randn(3, LENGTH, DIM)
        with lorica.disabled(model):
            torch.testing.assert_close(model(x), before(x))
            with torch.no_grad():
                torch.testing.assert_close(model.eval()(x), before.eval()(x))

    def test_dropout_of_the_update_where_the_layers_are_called(self) -> None:
        base = nn.TransformerEncoderLayer(DIM, 2, 12, dropout=0.0, batch_first=True)
        model, before = oracle.adapted(base, "linear1", "linear2", lora_dropout=0.5)
        x = torch.randn(3, LENGTH, DIM)
        assert not torch.equal(model(x), model(x))
        with torch.no_grad():
            oracle.assert_as_folded(model.eval(), before.eval(), x)

    def test_a_layer_with_a_forward_of_its_own_would_be_passed_by(self) -> None:
        class Doubling(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) * 2

        base = nn.TransformerEncoderLayer(DIM, 2, 12)
        base.linear1 = Doubling(DIM, 12)
        with pytest.raises(
            TargetError, match=r"linear1 is a Doubling .* reads its weight without calling it"
        ):
            oracle.adapted(base, "linear1")

    def test_attach_refuses_that_too(self) -> None:
        class Doubling(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) * 2

        model, _ = self.layer()
        adapter = lorica.extract(model)
        other = nn.TransformerEncoderLayer(DIM, 2, 12)
        other.linear2 = Doubling(12, DIM)
        with pytest.raises(
            lorica.LoricaError, match=r"linear2 is a Doubling .* reads its weight without calling it"
        ):
            lorica.attach(other, adapter)


class TestTrainedWhole:
    """Parts of an encoder layer with a copy: torch's kernels see the copy's weights, and these train."""

    PARTS = ("self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")

    @staticmethod
    def layer(*parts: str) -> tuple[Any, Any]:
        """A layer with parts trained whole, and one that holds the copies' weights itself."""
        torch.manual_seed(0)
        model: Any = nn.TransformerEncoderLayer(DIM, 2, 12, dropout=0.0, batch_first=True)
        expected = copy.deepcopy(model)
        target = "linear2" if "linear1" in parts else "linear1"  # left as it is, for B is zero
        lorica.adapt(model, lorica.LoraConfig(target_modules=[target], modules_to_save=list(parts)))
        for part in parts:
            shake(model.get_submodule(part).modules_to_save)
        for part in parts:
            twin = model.get_submodule(part).modules_to_save["default"]
            expected.get_submodule(part).load_state_dict(twin.state_dict())
        return model, expected

    @pytest.mark.parametrize("part", PARTS)
    def test_on_every_path(self, part: str, fused_calls: list[str]) -> None:
        model, expected = self.layer(part)
        x = torch.randn(3, LENGTH, DIM)
        torch.testing.assert_close(model(x), expected(x))
        torch.testing.assert_close(model.eval()(x), expected.eval()(x))
        fused_calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected(x))
        assert fused_calls == ["_transformer_encoder_layer_fwd"] * 2

    @pytest.mark.parametrize("part", PARTS)
    def test_it_trains(self, part: str) -> None:
        model, expected = self.layer(part)
        x, weights = torch.randn(3, LENGTH, DIM), torch.randn(3, LENGTH, DIM)
        (model(x) * weights).sum().backward()
        (expected(x) * weights).sum().backward()
        twin = model.get_submodule(part).modules_to_save["default"]
        assert all(p.requires_grad for p in twin.parameters())
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(parameter.grad, expected.get_parameter(f"{part}.{name}").grad)

    @pytest.mark.parametrize("part", PARTS)
    def test_disabled_merged_restored_detached(self, part: str) -> None:
        model, expected = self.layer(part)
        before = lorica.detach(copy.deepcopy(model))
        assert type(before.get_submodule(part)) is type(expected.get_submodule(part))
        model, expected, before = (m.eval() for m in (model, expected, before))
        x = torch.randn(3, LENGTH, DIM)
        with torch.no_grad():
            with lorica.disabled(model):
                assert torch.equal(model(x), before(x))
            assert torch.equal(model(x), expected(x))
            lorica.merge(model)
            assert torch.equal(model(x), expected(x))
            lorica.restore(model)
            assert torch.equal(model(x), expected(x))
            lorica.detach(model)
            assert torch.equal(model(x), before(x))

    def test_another_adapter_starts_from_the_original(self) -> None:
        model, _ = self.layer("norm1", "self_attn")
        base = {name: t.clone() for name, t in model.state_dict().items() if "modules_to_save" not in name}
        lorica.adapt(model, lorica.BitFitConfig(), "biases")
        for name, slot in model.lorica_state.stand_ins("biases").items():
            assert torch.equal(slot, base[name])
        with lorica.disabled(model):
            now = model.state_dict()
            assert all(torch.equal(now[name], tensor) for name, tensor in base.items())

    def test_rows_cannot_differ(self) -> None:
        model = nn.Sequential(nn.TransformerEncoderLayer(DIM, 2, 12), nn.Linear(DIM, 3))
        lorica.adapt(model, lorica.LoraConfig(target_modules=["1"], modules_to_save=["norm1"]))
        with pytest.raises(StateError, match="norm1 is read past its layer"):
            lorica.mixed(model, ["default", None])


class TestEncoder:
    @pytest.fixture
    def models(self) -> tuple[Any, Any]:
        layer = nn.TransformerEncoderLayer(DIM, 2, 12, dropout=0.0, batch_first=True)
        return oracle.adapted(nn.TransformerEncoder(layer, 2), *ENCODER)

    def test_training_with_padding(self, models: tuple[Any, Any]) -> None:
        x = torch.randn(3, LENGTH, DIM, requires_grad=True)
        oracle.assert_as_folded(*models, x, src_key_padding_mask=padding())

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
    def test_nested_tensors_in_evaluation(self, models: tuple[Any, Any], fused_calls: list[str]) -> None:
        model, before = (m.eval() for m in models)
        x = torch.randn(3, LENGTH, DIM)
        with torch.no_grad():
            y = oracle.assert_as_folded(model, before, x, src_key_padding_mask=padding())
        assert "_transformer_encoder_layer_fwd" in fused_calls
        assert not y[padding()].any()  # only the nested path leaves padding zero
        slow = model(x, src_key_padding_mask=padding())
        torch.testing.assert_close(y[~padding()], slow[~padding()], rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
    @pytest.mark.parametrize("part", ["layers.0", "self_attn", "norm1"])
    @pytest.mark.parametrize("grad", [True, False])
    def test_parts_trained_whole_with_padding(self, part: str, grad: bool) -> None:
        layer = nn.TransformerEncoderLayer(DIM, 2, 12, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2)
        model = nn.ModuleDict({"encoder": encoder, "out": nn.Linear(DIM, 3)})
        lorica.adapt(model, lorica.LoraConfig(target_modules=["out"], modules_to_save=[part]))
        shake(model)
        x = torch.randn(3, LENGTH, DIM)
        expected = encoder(x, src_key_padding_mask=padding())
        model.eval()
        with torch.set_grad_enabled(grad):
            y = encoder(x, src_key_padding_mask=padding())
        torch.testing.assert_close(y[~padding()], expected[~padding()], rtol=1e-4, atol=1e-5)

    def test_layers_cloned_from_an_adapted_one_have_updates_of_their_own(self) -> None:
        layer, before = oracle.adapted(nn.TransformerEncoderLayer(DIM, 2, 12, batch_first=True), *ENCODER)
        twin = copy.deepcopy(layer)
        x = torch.randn(3, LENGTH, DIM)
        with lorica.disabled(layer):
            oracle.assert_as_folded(twin.eval(), before.eval(), x)


def test_the_decoder_layer() -> None:
    base = nn.TransformerDecoderLayer(DIM, 2, 12, dropout=0.0, batch_first=True)
    model, before = oracle.adapted(base, "self_attn", "multihead_attn", "linear1", "linear2")
    x, memory = (torch.randn(3, length, DIM, requires_grad=True) for length in (LENGTH, 7))
    oracle.assert_as_folded(model, before, x, memory)


@pytest.mark.parametrize("pattern", ["attention", r".*attention", "out_proj"])
def test_patterns_of_an_attention_hold_for_its_output(pattern: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "other": nn.Linear(8, 8)})
    ranks: dict[str, Any] = {"rank_pattern": {pattern: 5}, "alpha_pattern": {pattern: 3}}
    config = lorica.LoraConfig(r=2, lora_alpha=4, target_modules=["attention", "other"], **ranks)
    model = lorica.adapt(copy.deepcopy(base), config)
    shake(model)
    found = lorica.extract(model).factors
    own = (5, 3 / 5), (2, 2.0)
    expected = {"attention": own[pattern == "out_proj"], "attention.out_proj": own[0], "other": own[1]}
    assert {path: (f.r, f.scale) for path, f in found.items()} == expected
    lorica.save(model, tmp_path)
    again = lorica.extract(lorica.load(copy.deepcopy(base), tmp_path)).factors
    assert {path: (f.r, f.scale) for path, f in again.items()} == expected
    # As PEFT writes it, whose patterns name the attention alone.
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text()) | ranks
    file.write_text(json.dumps(written))
    again = lorica.extract(lorica.load(copy.deepcopy(base), tmp_path, trainable=True)).factors
    assert {path: (f.r, f.scale) for path, f in again.items()} == expected
