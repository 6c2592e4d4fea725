"""Adapters taken off a model as values, put on another, and given new values."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from tiny import Toy, adapted, bits, outputs, record, shake, transformer
from torch import nn

import lorica
from lorica.errors import AdapterError, LoricaWarning, StateError
from lorica.model.files import extract_live, overwrite

CONFIG = lorica.LoraConfig(r=2, target_modules=["up", "embed"], modules_to_save=["head"], bias="lora_only")


def trained(config: lorica.LoraConfig = CONFIG, seed: int = 0) -> lorica.Adapter:
    """A trained adapter of a `Toy`."""
    torch.manual_seed(0)
    return lorica.extract(adapted(Toy(), config, seed=seed))


def fresh() -> Toy:
    torch.manual_seed(0)
    return Toy()


def changed(adapter: lorica.Adapter, **changes: Any) -> lorica.Adapter:
    return dataclasses.replace(adapter, **changes)


class TestExtract:
    """From a model to a value."""

    def test_it_holds_all_that_trains_and_nothing_else(self) -> None:
        model = adapted(fresh(), CONFIG)
        adapter = lorica.extract(model)
        assert list(adapter.factors) == ["embed", "blocks.0.up", "blocks.1.up"]
        assert {path: f.kind for path, f in adapter.factors.items()} == {
            "embed": "embedding",
            "blocks.0.up": "linear",
            "blocks.1.up": "linear",
        }
        assert sorted(adapter.extras) == ["blocks.0.up.bias", "blocks.1.up.bias", "head.bias", "head.weight"]
        assert adapter.numel == lorica.trainable_parameters(model).trainable
        assert adapter.config == lorica.adapters(model)["default"]

    def test_it_shares_memory_with_the_model(self) -> None:
        model = adapted(fresh(), CONFIG)
        adapter = lorica.extract(model)
        shake(model, seed=3)
        assert {bits(t) for t in adapter.named_tensors().values()} == {
            bits(p) for p in model.parameters() if p.requires_grad
        }
        assert not any(tensor.requires_grad for tensor in adapter.named_tensors().values())

    def test_which_adapter_must_be_clear(self) -> None:
        model = lorica.adapt(adapted(fresh(), CONFIG, "a"), CONFIG.replace(r=3), "b")
        assert lorica.extract(model).lora.r == 3  # the only one that acts
        assert lorica.extract(model, "a").lora.r == 2
        lorica.disabled(model)
        with pytest.raises(AdapterError, match="which adapter\\? The model has 'a', 'b'"):
            lorica.extract(model)
        with pytest.raises(AdapterError, match="no adapter is named 'c'"):
            lorica.extract(model, "c")

    def test_an_adapter_that_waits_is_whole_too(self) -> None:
        model = adapted(fresh(), CONFIG.replace(bias="all"), "a")
        before = {name: bits(t) for name, t in lorica.extract(model, "a").named_tensors().items()}
        adapted(model, CONFIG.replace(bias="all"), "b", seed=1)
        assert {name: bits(t) for name, t in lorica.extract(model, "a").named_tensors().items()} == before

    def test_values_may_come_from_a_gathered_state(self) -> None:
        model = adapted(fresh(), CONFIG)
        gathered = {name: torch.full_like(t, 7.0) for name, t in model.state_dict().items()}
        adapter = lorica.extract(model, state_dict=gathered)
        assert all(bool((t == 7).all()) for t in adapter.named_tensors().values())

    def test_a_merged_adapter_stays_where_it_is(self) -> None:
        model = adapted(fresh(), CONFIG)
        lorica.merge(model)
        with pytest.raises(StateError, match=r"call lorica\.restore"):
            lorica.extract(model)


class TestAttach:
    """From a value to a model."""

    @pytest.mark.parametrize(
        "config",
        [
            CONFIG,
            lorica.LoraConfig(r=2, target_modules=["up"]),
            lorica.LoraConfig(r=2, target_modules="all-linear", bias="all"),
            lorica.LoraConfig(r=2, use_rslora=True, target_modules=["up", "down"], rank_pattern={"up": 3}),
        ],
    )
    def test_the_other_model_computes_the_same(self, config: lorica.LoraConfig) -> None:
        source = adapted(fresh(), config)
        target = fresh()
        assert lorica.attach(target, lorica.extract(source)) is target
        assert bits(outputs(target)) == bits(outputs(source))
        assert lorica.adapters(target) == lorica.adapters(source)

    def test_tensors_are_copied(self) -> None:
        adapter = trained()
        model = lorica.attach(fresh(), adapter, trainable=True)
        before = {name: bits(t) for name, t in adapter.named_tensors().items()}
        shake(model, seed=5)
        assert {name: bits(t) for name, t in adapter.named_tensors().items()} == before

    def test_taking_it_back_gives_the_same_names_and_values(self) -> None:
        adapter = trained(CONFIG.replace(bias="all"))
        with torch.no_grad():
            adapter.extras["norm.bias"].zero_()  # as in the base: a bias that training did not move
        again = lorica.extract(lorica.attach(fresh(), adapter, trainable=True))
        assert {n: bits(t) for n, t in again.named_tensors().items()} == {
            n: bits(t) for n, t in adapter.named_tensors().items()
        }

    def test_it_is_frozen_unless_asked(self) -> None:
        assert lorica.trainable_parameters(lorica.attach(fresh(), trained())).trainable == 0
        count = lorica.trainable_parameters(lorica.attach(fresh(), trained(), trainable=True)).trainable
        assert count == trained().numel

    def test_the_first_acts_and_a_later_one_waits(self) -> None:
        model = lorica.attach(fresh(), trained(), "a")
        a = bits(outputs(model))
        lorica.attach(model, trained(seed=1), "b")
        assert bits(outputs(model)) == a
        lorica.active(model, "b")
        assert bits(outputs(model)) == bits(outputs(lorica.attach(fresh(), trained(seed=1))))
        lorica.disabled(model)
        lorica.attach(model, trained(seed=2), "c")
        assert bits(outputs(model)) == bits(outputs(fresh()))

    def test_detaching_gives_the_model_back(self) -> None:
        model = fresh()
        before = record(model)
        lorica.attach(model, trained(), "a")
        lorica.attach(model, trained(seed=1), "b", trainable=True)
        assert record(lorica.detach(model)) == before

    @pytest.mark.parametrize("name", ["bert-masked", "gpt2", "vit"])
    def test_tied_and_fused_weights(self, name: str) -> None:
        config = lorica.LoraConfig(r=2, bias="all")
        source = adapted(transformer(name), config)
        target = lorica.attach(transformer(name), lorica.extract(source))
        torch.testing.assert_close(outputs(target, name), outputs(source, name), rtol=0, atol=0)

    def test_a_lower_precision_base_keeps_float32_factors_and_copies(self) -> None:
        model = lorica.attach(Toy(dtype=torch.bfloat16), trained())
        adapter = lorica.extract(model)
        assert bits(adapter.factors["embed"].A) == bits(trained().factors["embed"].A)
        assert bits(adapter.extras["head.weight"]) == bits(trained().extras["head.weight"])


class TestRefused:
    """What does not fit: one list, and the model as it was."""

    def refusal(self, model: nn.Module, adapter: lorica.Adapter, name: str = "default") -> str:
        before = record(model)
        with pytest.raises(AdapterError) as error:
            lorica.attach(model, adapter, name)
        assert record(model) == before
        return str(error.value)

    def test_everything_that_is_wrong_stands_in_one_list(self) -> None:
        adapter = trained(CONFIG.replace(target_modules=["up", "down"]))
        factors = dict(adapter.factors)
        factors["blocks.2.up"] = factors.pop("blocks.1.up")
        factors["embed"] = factors["blocks.0.down"]
        f = factors["blocks.0.up"]
        factors["blocks.0.up"] = dataclasses.replace(f, A=f.A[:, :-1])
        extras = dict(adapter.extras)
        del extras["head.bias"], extras["blocks.0.down.bias"]
        extras["head.weight"] = extras["head.weight"][:-1]
        extras["tail.weight"] = torch.zeros(1)
        message = self.refusal(fresh(), changed(adapter, factors=factors, extras=extras))
        assert message.splitlines() == [
            "the adapter does not fit this Toy:",
            "  shape of blocks.0.up: A (2, 5) and B (12, 2) in the adapter, (2, 6) and (12, 2) in the model",
            "  unexpected: blocks.2.up is not in the model; did you mean 'blocks.1.up'?",
            "  kind of embed: linear in the adapter, Embedding in the model",
            "  shape of head.weight: (2, 6) in the adapter, (3, 6) in the model",
            "  unexpected: tail.weight is not a parameter of the model; did you mean 'head.weight'?",
            "  missing: head.bias",
            "  missing: blocks.0.down.bias",
            "  missing: blocks.1.up",
        ]

    def test_an_adapter_of_another_architecture(self) -> None:
        adapter = lorica.extract(adapted(transformer("bert"), lorica.LoraConfig(r=2)))
        message = self.refusal(transformer("distilbert"), adapter)
        assert message.count("unexpected: encoder.layer.") == 4

    def test_an_adapter_of_another_size(self) -> None:
        adapter = lorica.extract(adapted(transformer("bert"), lorica.LoraConfig(r=2)))
        assert (
            self.refusal(transformer("bert", hidden_size=32), adapter).count("shape of encoder.layer.") == 4
        )

    def test_a_list_too_long_is_cut(self) -> None:
        adapter = trained()
        factors = {f"other.{i}": adapter.factors["embed"] for i in range(100)}
        assert "... and " in self.refusal(fresh(), changed(adapter, factors=factors))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_numbers_that_are_none(self, value: float) -> None:
        adapter = trained()
        adapter.factors["embed"].B[0, 0] = value
        assert "NaN or infinity in embed (B)" in self.refusal(fresh(), adapter)

    def test_a_target_of_the_wrong_kind(self) -> None:
        adapter = trained()
        f = adapter.factors["embed"]
        model = fresh()
        message = self.refusal(model, changed(adapter, factors={"norm": f}))
        assert "kind of norm: embedding in the adapter, LayerNorm in the model" in message
        linear = {"head": adapter.factors["blocks.0.up"]}
        plain = changed(
            adapter, factors=linear, extras={}, config=lorica.LoraConfig(r=2, target_modules=["head"])
        )
        model = adapted(fresh(), CONFIG, "whole")
        assert "kind of head: linear in the adapter, " in self.refusal(model, plain, "b")

    def test_an_attention_that_cannot_take_it(self) -> None:
        source = adapted(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), lorica.LoraConfig(r=2))
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=4)})
        assert "target its out_proj" in self.refusal(model, lorica.extract(source))

    def test_names(self) -> None:
        model = lorica.attach(fresh(), trained(), "a")
        assert "already has an adapter named 'a'" in self.refusal(model, trained(), "a")
        assert "letters, digits" in self.refusal(model, trained(), "../a")

    def test_not_while_another_is_merged(self) -> None:
        model = lorica.attach(fresh(), trained(), "a")
        lorica.merge(model)
        before = record(model)
        with pytest.raises(StateError, match="cannot add an adapter while 'a' is merged"):
            lorica.attach(model, trained(), "b")
        assert record(model) == before


class TestOverwrite:
    """New values for an adapter that is there."""

    def test_only_values_change(self) -> None:
        model = adapted(fresh(), CONFIG.replace(bias="all")).train()
        before = record(model)
        adapter = trained(CONFIG.replace(bias="all"), seed=1)
        overwrite(model, adapter)
        after = record(model)
        assert after._replace(values=[]) == before._replace(values=[])
        assert {n: bits(t) for n, t in lorica.extract(model).named_tensors().items()} == {
            n: bits(t) for n, t in adapter.named_tensors().items()
        }
        assert all(module.training for module in model.modules())

    def test_a_waiting_adapter_takes_them_too(self) -> None:
        model = adapted(adapted(fresh(), CONFIG, "a"), CONFIG, "b", seed=1)
        b = bits(outputs(model))
        overwrite(model, trained(seed=2), "a")
        assert bits(outputs(model)) == b
        lorica.active(model, "a")
        assert bits(outputs(model)) == bits(outputs(lorica.attach(fresh(), trained(seed=2))))

    def test_everything_that_is_wrong_stands_in_one_list(self) -> None:
        model = adapted(fresh(), CONFIG)
        before = record(model)
        adapter = trained(CONFIG.replace(rank_pattern={"0.up": 3}))
        factors, extras = dict(adapter.factors), dict(adapter.extras)
        factors["other"] = factors.pop("embed")
        del extras["head.bias"]
        with pytest.raises(AdapterError) as error:
            overwrite(model, changed(adapter, factors=factors, extras=extras))
        assert str(error.value).splitlines() == [
            "the adapter does not fit the one on the model:",
            "  missing: embed (A)",
            "  missing: embed (B)",
            "  missing: head.bias",
            "  unexpected: other (A)",
            "  unexpected: other (B)",
            "  shape of blocks.0.up (A): (3, 6) in the adapter, (2, 6) on the model",
            "  shape of blocks.0.up (B): (12, 3) in the adapter, (12, 2) on the model",
            "  scale of blocks.0.up: 2.66667 in the adapter, 4 on the model",
        ]
        assert record(model) == before

    @pytest.mark.parametrize(
        ("theirs", "ours", "problem"),
        [
            ({"lora_alpha": 64}, {}, "scale of blocks.0.up: 32 in the adapter, 4 on the model"),
            ({}, {"use_rslora": True}, "scale of blocks.0.up: 4 in the adapter, 5.65685 on the model"),
            (
                {"trainable_token_indices": {"embed": [1, 2]}},
                {"trainable_token_indices": {"embed": [3, 4]}},
                "tokens of embed: [1, 2] in the adapter, [3, 4] on the model",
            ),
            (
                {},
                {"init_lora_weights": "pissa"},
                "init_lora_weights: True in the adapter, 'pissa' on the model; each means another base",
            ),
            (
                {"init_lora_weights": "loftq"},
                {},
                "init_lora_weights: 'loftq' in the adapter, True on the model; each means another base",
            ),
        ],
    )
    def test_values_that_mean_something_else(
        self, theirs: dict[str, Any], ours: dict[str, Any], problem: str
    ) -> None:
        config = lorica.LoraConfig(r=2, target_modules=["0.up"])
        adapter = trained(config.replace(**theirs))
        model = adapted(fresh(), config.replace(**ours))
        before = record(model)
        with pytest.raises(AdapterError, match=re.escape(f"on the model:\n  {problem}")):
            overwrite(model, adapter)
        assert record(model) == before
        with pytest.warns(LoricaWarning, match=re.escape(problem)):
            overwrite(model, adapter, strict=False)
        assert {n: bits(t) for n, t in extract_live(model).named_tensors().items()} == {
            n: bits(t) for n, t in adapter.named_tensors().items()
        }

    def test_the_same_tokens_in_another_form(self) -> None:
        config = lorica.LoraConfig(r=2, target_modules=["query"], trainable_token_indices=[1, 2])
        source = adapted(transformer("bert"), config)
        named = config.replace(trainable_token_indices={"word_embeddings": [1, 2]})
        model = adapted(transformer("bert"), named, seed=1)
        overwrite(model, lorica.extract(source))
        assert bits(outputs(model)) == bits(outputs(source))

    def test_numbers_that_are_none(self) -> None:
        model = adapted(fresh(), CONFIG)
        before = record(model)
        adapter = trained(seed=1)
        adapter.extras["head.weight"][0, 0] = float("nan")
        with pytest.raises(AdapterError, match=r"NaN or infinity in head\.weight"):
            overwrite(model, adapter)
        assert record(model) == before
