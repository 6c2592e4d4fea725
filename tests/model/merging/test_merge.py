"""Merging and restoring."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from model.merging.trained import CONFIG, WHOLE, model_with, state
from tiny import Toy, adapted, bits, outputs, record, transformer
from torch import Tensor, nn

import lorica
from lorica.errors import AdapterError, StateError


def delta(factors: lorica.Factors) -> Tensor:
    """``scale·B·A`` in float64, as the weight is stored."""
    product = factors.scale * torch.einsum(
        "or,ri->oi", factors.B.flatten(1).double(), factors.A.flatten(1).double()
    )
    return product.T if factors.kind == "embedding" else product


def reference(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """W0 + Σ scale·B·A in float64 by parameter name, for the named adapters."""
    sums: dict[str, Tensor] = {}
    with lorica.disabled(model):
        for name in names:
            for path, factors in lorica.extract(model, name).factors.items():
                weight = model.get_submodule(path)._parameters["weight"]
                assert weight is not None
                sums[f"{path}.weight"] = sums.get(f"{path}.weight", weight.detach().double()) + delta(factors)
    return sums


class TestMerge:
    """The weights with the updates in them."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_a_merged_weight_is_the_sum_rounded_once(self, dtype: torch.dtype) -> None:
        model = model_with(CONFIG, model=Toy(dtype=dtype))
        expected = reference(model, "a")
        assert len(expected) == 5
        lorica.merge(model)
        for name, exact in expected.items():
            weight = model.get_parameter(name)
            assert weight.dtype == dtype
            precision = torch.promote_types(dtype, torch.float32)
            # Half a unit in the last place, and what float32's own sum may be off before it is rounded.
            slack = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(precision).eps
            torch.testing.assert_close(
                weight.double(), exact, rtol=slack, atol=8 * torch.finfo(precision).eps
            )

    def test_in_bfloat16_it_is_the_float32_sum_to_the_bit(self) -> None:
        model = model_with(CONFIG, model=Toy(dtype=torch.bfloat16))
        factors = lorica.extract(model).factors
        W0 = {path: model.get_parameter(f"{path}.weight").detach() for path in factors}
        expected = {}
        for path, f in factors.items():
            product = f.A.T @ f.B.T if f.kind == "embedding" else f.B @ f.A
            expected[path] = torch.add(W0[path].float(), product, alpha=f.scale).bfloat16()
        lorica.merge(model)
        same = [(model.get_parameter(f"{path}.weight") == expected[path]).float().mean() for path in factors]
        assert min(same) > 0.999  # but where the order of float32 additions tips a tie

    def test_outputs_agree(self) -> None:
        model = model_with(WHOLE)
        before = outputs(model)
        lorica.merge(model)
        torch.testing.assert_close(outputs(model), before)

    @pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "t5", "llama", "vit"])
    def test_outputs_of_transformers_agree(self, name: str) -> None:
        model = adapted(transformer(name), lorica.LoraConfig(r=3, target_modules="all-linear", bias="all"))
        before = outputs(model, name)
        lorica.merge(model)
        torch.testing.assert_close(outputs(model, name), before, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    def test_convolutions_and_attention(self, training: bool) -> None:
        convolutions = nn.Sequential(
            nn.Conv2d(3, 4, 3, dilation=2), nn.Flatten(2), nn.Conv1d(4, 5, 2, stride=2)
        )
        attention = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        for model, x, names in (
            (convolutions, torch.randn(2, 3, 7, 7), ["0", "2"]),
            (attention, torch.randn(2, 5, 8), ["self_attn", "linear1", "linear2"]),
        ):
            adapted(model.train(training), lorica.LoraConfig(r=2, target_modules=names))
            with torch.no_grad():
                before = model(x)
                lorica.merge(model)
                torch.testing.assert_close(model(x), before)

    def test_several_at_once_add_up(self) -> None:
        model = model_with(CONFIG, CONFIG.replace(target_modules=["up"]))
        lorica.active(model, ["a", "b"])
        before, expected = outputs(model), reference(model, "a", "b")
        lorica.active(model, "a")
        report = lorica.merge(model, ["b", "a", "b"])
        assert report.names == ("b", "a")
        torch.testing.assert_close(outputs(model), before)
        for name, exact in expected.items():
            torch.testing.assert_close(model.get_parameter(name).double(), exact, rtol=1e-6, atol=1e-6)

    def test_the_module_tree_is_the_base_again(self) -> None:
        model = Toy()
        before = record(model)
        model_with(WHOLE, CONFIG, model=model)
        lorica.merge(model, "a")
        after = record(model)
        assert after.classes == before.classes
        assert after.keys == before.keys
        assert [name for name, _ in after.tensors] == [name for name, _ in before.tensors]
        assert str(model) == str(Toy())

    @pytest.mark.parametrize("name", ["gpt2", "bert-masked"])
    def test_a_transformers_model_is_its_own_class_again(self, name: str) -> None:
        model = transformer(name)
        before = record(model)
        adapted(model, lorica.LoraConfig(r=2))
        lorica.merge(model)
        assert record(model).classes == before.classes
        assert record(model).keys == before.keys

    def test_nothing_trains_while_merged(self) -> None:
        model = model_with(CONFIG)
        lorica.merge(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_refused_where_there_is_nothing_to_do(self) -> None:
        model = model_with(CONFIG)
        with pytest.raises(AdapterError, match="no adapter is named 'z'"):
            lorica.merge(model, "z")
        with lorica.disabled(model), pytest.raises(StateError, match="no adapter is active; say which"):
            lorica.merge(model)
        lorica.merge(model)
        with pytest.raises(
            StateError, match=r"cannot merge while 'a' is merged into the weights; call lorica\.restore"
        ):
            lorica.merge(model)

    @pytest.mark.parametrize(
        "operation",
        [
            lambda model: lorica.active(model, "a"),
            lambda model: lorica.disabled(model),
            lambda model: lorica.detach(model),
            lambda model: lorica.adapt(model, CONFIG, "b"),
            lambda model: lorica.extract(model, "a"),
        ],
    )
    def test_what_needs_the_base_is_refused_while_merged(self, operation: Any) -> None:
        model = model_with(CONFIG)
        lorica.merge(model)
        before = record(model)
        with pytest.raises(StateError, match="while 'a' is merged"):
            operation(model)
        assert record(model) == before

    def test_merging_inside_a_choice_must_be_undone_inside(self) -> None:
        model = model_with(WHOLE, WHOLE)
        choice = lorica.active(model, "a")
        lorica.merge(model)
        merged = record(model)
        with pytest.raises(StateError, match="while 'a' is merged"), choice:
            pass
        assert record(model) == merged

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none_leave_the_model_alone(self, value: float) -> None:
        model = model_with(WHOLE, WHOLE)
        lorica.extract(model, "a").factors["blocks.1.down"].B[0, 0] = value
        before = record(model)
        with pytest.raises(
            AdapterError, match=r"blocks\.1\.down: the merged weight would hold NaN or infinity"
        ):
            lorica.merge(model, "a")
        assert record(model) == before
        assert list(lorica.extract(model).lora.target_modules or ()) == ["up", "down", "embed"]

    def test_an_interrupt_leaves_the_model_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_with(WHOLE, WHOLE)
        before = record(model)

        def interrupt(*_: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(importlib.import_module("lorica.model.merging.merge"), "state_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lorica.merge(model, "a")
        assert record(model) == before

    def test_an_overflow_of_the_weights_own_type_is_refused(self) -> None:
        model = model_with(CONFIG, model=Toy(dtype=torch.float16))
        lorica.extract(model).factors["embed"].B.mul_(1e6)
        before = record(model)
        with pytest.raises(AdapterError, match=r"embed: .* infinity in torch\.float16"):
            lorica.merge(model)
        assert record(model) == before

    def test_a_grouped_convolution_is_refused(self) -> None:
        model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, groups=2))
        adapted(model, lorica.LoraConfig(r=2, target_modules=["0", "1"]))
        before = record(model)
        with pytest.raises(StateError, match="1: a convolution with 2 groups cannot be merged"):
            lorica.merge(model)
        assert record(model) == before

    def test_a_packed_weight_is_refused(self) -> None:
        class Packed(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return nn.functional.linear(input, self.weight.float(), self.bias)

        model = nn.Sequential(Packed(4, 4))
        model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        adapted(model, lorica.LoraConfig(r=2, target_modules=["0"]))
        with pytest.raises(StateError, match="0: a quantized Packed"):
            lorica.merge(model)

    def test_two_heads_cannot_be_merged_together(self) -> None:
        model = model_with(CONFIG.replace(modules_to_save=["head"]), CONFIG.replace(modules_to_save=["head"]))
        before = record(model)
        with pytest.raises(AdapterError, match="cannot act together"):
            lorica.merge(model, ["a", "b"])
        assert record(model) == before


class TestReport:
    """What rounding cost."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_loss_is_what_was_stored_against_the_exact_sum(self, dtype: torch.dtype) -> None:
        model = model_with(CONFIG, model=Toy(dtype=dtype))
        expected, factors = reference(model, "a"), lorica.extract(model).factors
        report = lorica.merge(model)
        assert list(report.layers) == list(factors)
        for path, f in factors.items():
            lost = model.get_parameter(f"{path}.weight").double() - expected[f"{path}.weight"]
            assert report.layers[path] == pytest.approx(float(lost.norm() / delta(f).norm()), rel=1e-6)
            assert 0 < report.layers[path] < (1e-5 if dtype == torch.float32 else 0.2)

    def test_an_update_below_the_weights_precision_is_lost(self) -> None:
        model = model_with(CONFIG, model=Toy(dtype=torch.bfloat16))
        for f in lorica.extract(model).factors.values():
            f.B.mul_(1e-7)
        assert lorica.merge(model).worst[1] == pytest.approx(1, abs=0.2)

    def test_no_update_loses_nothing(self) -> None:
        report = lorica.merge(lorica.adapt(Toy(), CONFIG.replace(target_modules=["up"])))
        assert set(report.layers.values()) == {0.0}

    def test_text(self) -> None:
        report = lorica.MergeReport(("a", "b"), {"x.y": 1e-3, "z": 0.25}, ["embed", "head"])
        assert str(report).splitlines() == [
            "merged a, b into 2 layers; share of each update lost to rounding:",
            "   2.50e-01  z",
            "   1.00e-03  x.y",
            "no longer tied: embed, head",
        ]
        assert report.worst == ("z", 0.25)
        assert lorica.MergeReport((), {}).worst == ("", 0.0)


class TestRestore:
    """W0 back."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_everything_is_what_and_where_it_was(self, dtype: torch.dtype) -> None:
        model = model_with(WHOLE, CONFIG, model=Toy(dtype=dtype))
        before = record(model)
        lorica.merge(model, "a")
        assert lorica.restore(model) is model
        assert record(model) == before
        lorica.active(model, "a")
        lorica.merge(model, "b")
        lorica.switch(model, "a")
        lorica.restore(model)
        lorica.active(model, "b")
        assert record(model) == before

    def test_those_act_that_did_before(self) -> None:
        model = model_with(WHOLE, CONFIG)
        b = bits(outputs(model))
        lorica.merge(model, "a")
        lorica.restore(model)
        assert bits(outputs(model)) == b

    def test_a_copy_and_a_pickle_of_a_merged_model_can_be_restored(self, tmp_path: Path) -> None:
        model = model_with(WHOLE)
        base = outputs(lorica.detach(copy.deepcopy(model)))
        lorica.merge(model)
        torch.save(model, tmp_path / "model.pt")
        for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert bits(outputs(twin)) == bits(outputs(model))
            assert bits(outputs(lorica.detach(lorica.restore(twin)))) == bits(base)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_chosen_while_merged_holds_for_all(self, training: bool) -> None:
        model: Any = Toy()
        model.head = nn.Sequential(nn.Dropout(), nn.Linear(6, 3))
        model_with(WHOLE, WHOLE, model=model)
        model.train(not training)
        lorica.merge(model, "a")
        model.train(training)
        lorica.switch(model, "b")
        model.train(not training)
        lorica.switch(model, "a")
        model.train(training)
        lorica.restore(model)
        assert all(module.training is training for module in model.modules())

    @pytest.mark.parametrize("switch", [True, False])
    def test_a_conversion_while_merged_reaches_what_was_set_aside(self, switch: bool) -> None:
        model: Any = Toy()
        model.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
        rows = {"trainable_token_indices": {"embed": [1, 5]}, "target_modules": ["up"]}
        model_with(WHOLE.replace(**rows), WHOLE.replace(**rows), model=model)
        expected = copy.deepcopy(model).double().eval()
        lorica.merge(model, "a")
        model.double().eval()
        for name in "ba" if switch else "":
            lorica.switch(model, name)
            with lorica.active(expected, name):
                torch.testing.assert_close(outputs(model), outputs(expected))
        lorica.restore(model)
        assert state(model) == state(expected)
        assert torch.equal(outputs(model), outputs(expected))

    def test_nothing_to_restore(self) -> None:
        with pytest.raises(StateError, match="nothing is merged"):
            lorica.restore(model_with(CONFIG))

    def test_detach_after_it_is_the_base(self) -> None:
        model = Toy()
        before = state(model)
        model_with(WHOLE, WHOLE, model=model)
        lorica.merge(model)
        lorica.detach(lorica.restore(model))
        assert state(model) == before


class TestTied:
    """Weights under two names: the embedding and the head of a language model."""

    CASES: ClassVar = [
        ("gpt2", {"target_modules": ["c_attn"]}, False),
        ("gpt2", {"target_modules": ["wte"]}, True),
        ("gpt2", {"target_modules": ["lm_head"]}, True),
        ("gpt2", {"target_modules": ["wte", "lm_head", "c_attn"]}, True),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}, True),
        ("bert-masked", {"target_modules": ["word_embeddings"]}, True),
        ("bert-masked", {"target_modules": ["decoder"]}, True),
        ("bert-masked", {"target_modules": ["decoder", "query"], "bias": "lora_only"}, True),
        ("bert-masked", {"target_modules": ["query"], "bias": "all"}, False),
        ("bert-masked", {"target_modules": ["query"], "modules_to_save": ["decoder"]}, True),
        ("t5", {"target_modules": ["lm_head"]}, True),
        ("t5", {"target_modules": ["encoder.embed_tokens"]}, True),
    ]

    def model(self, name: str) -> Any:
        """A model whose tied biases are not the zeros that a lost one would be replaced by."""
        model = transformer(name)
        for path, parameter in model.named_parameters():
            if path.endswith("predictions.bias"):
                nn.init.normal_(parameter)
        return model.requires_grad_(False)

    def reloaded(self, model: Any, directory: Path) -> nn.Module:
        model.save_pretrained(directory)
        return type(model).from_pretrained(directory).eval()

    @pytest.mark.parametrize(("name", "settings", "unties"), CASES)
    def test_merged_saved_and_read_again(
        self, name: str, settings: dict[str, Any], unties: bool, tmp_path: Path
    ) -> None:
        model = self.model(name)
        before, base = record(model), outputs(model, name)
        adapted(model, lorica.LoraConfig(r=2, **settings))
        live = outputs(model, name)
        assert not torch.allclose(live, base, atol=1e-3)
        report = lorica.merge(model)
        torch.testing.assert_close(outputs(model, name), live, rtol=1e-5, atol=1e-5)
        assert bool(report.untied) is unties
        assert model.config.tie_word_embeddings is not unties
        again = self.reloaded(model, tmp_path)
        torch.testing.assert_close(outputs(again, name), live, rtol=1e-5, atol=1e-5)
        lorica.detach(lorica.restore(model))
        assert record(model) == before
        assert model.config.tie_word_embeddings is True

    def test_switching_ties_and_unties(self, tmp_path: Path) -> None:
        model = self.model("bert-masked")
        before = record(model)
        adapted(model, lorica.LoraConfig(r=2), "plain")
        adapted(model, lorica.LoraConfig(r=2, target_modules=["word_embeddings"]), "table", seed=1)
        adapted(model, lorica.LoraConfig(r=2, modules_to_save=["decoder"]), "head", seed=2)
        for i, name in enumerate(["plain", "table", "plain", "head", "table", "head", "plain"]):
            lorica.switch(model, name)
            assert model.config.tie_word_embeddings is (name == "plain")
            again = self.reloaded(model, tmp_path / str(i))
            torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)
        lorica.detach(lorica.restore(model))
        assert record(model) == before
