"""The starts by PEFT's functions and arguments: the same as lorica's own, on wrapped models."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import quantized
from tiny import VOCABULARY, batch, shake, transformer
from torch import Tensor, nn

import lorica
from lorica import peft
from lorica.errors import AdapterError, ConfigError, StateError
from lorica.model import starts

TARGETS = ["q_proj", "down_proj"]


def batches(n: int = 3) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (n, 8, 12), generator=draw)
    return [{"input_ids": x, "labels": x} for x in ids]


def factors(model: nn.Module) -> dict[str, Tensor]:
    adapter = lorica.extract(model).factors
    return {f"{path}.{side}": getattr(f, side) for path, f in adapter.items() for side in "AB"}


def same(one: nn.Module, other: nn.Module) -> None:
    first, second = factors(one), factors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


EVA: dict[str, Any] = {"r": 2, "target_modules": TARGETS, "init_lora_weights": "eva"}


def eva_config(**more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**EVA, eva_config=peft.EvaConfig(rho=1.0, tau=0.9, **more))


def test_eva() -> None:
    ours = lorica.adapt(transformer("llama"), eva_config())
    starts.initialize_lora_eva_weights(ours, batches())
    calls = []

    def forward(model: Any, inputs: Any) -> Any:
        calls.append(model)
        return model(**inputs)

    model = peft.get_peft_model(transformer("llama"), eva_config())
    peft.initialize_lora_eva_weights(model, batches(), None, forward, adapter_name="default")
    same(model, ours)
    assert calls
    for wrapper in (model, transformer("llama")):
        config = None if wrapper is model else eva_config()
        found = peft.get_eva_state_dict(wrapper, batches(), config, show_progress_bar=False)
        other = peft.get_peft_model(transformer("llama"), eva_config())
        peft.initialize_lora_eva_weights(other, eva_state_dict=found)
        same(other, ours)


@pytest.mark.parametrize("function", [peft.initialize_lora_eva_weights, peft.get_eva_state_dict])
@pytest.mark.parametrize("name", ["prepare_model_inputs_fn", "prepare_layer_inputs_fn"])
def test_functions_of_ones_own_for_inputs_are_refused(function: Callable[..., Any], name: str) -> None:
    model = peft.get_peft_model(transformer("llama"), eva_config())
    with pytest.raises(ConfigError, match=f"{name} is not carried"):
        function(model, batches(), **{name: print})


def test_corda(tmp_path: Path) -> None:
    def config() -> peft.LoraConfig:
        return peft.LoraConfig(
            r=2,
            target_modules=TARGETS,
            init_lora_weights="corda",
            corda_config=peft.CordaConfig(corda_method="kpm"),
        )

    ours = transformer("llama")
    starts.preprocess_corda(ours, config(), batches())
    lorica.adapt(ours, config())
    for hooked in (None, transformer("llama")):
        base = transformer("llama")

        def run_model(model: nn.Module = base if hooked is None else hooked) -> None:
            for inputs in batches():
                model(**inputs)

        peft.preprocess_corda(base, lora_config=config(), run_model=run_model, hooked_model=hooked)
        same(peft.get_peft_model(base, config()), ours)
    with pytest.raises(AdapterError, match=r"hooked_model has no model\.layers\.0\.self_attn\.q_proj"):
        peft.preprocess_corda(transformer("llama"), config(), lambda: None, transformer("bert"))


def test_lora_ga(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )
    ours = transformer("llama")
    starts.preprocess_loraga(ours, config, batches())
    lorica.adapt(ours, config)
    base = transformer("llama")

    def train_step() -> None:
        for inputs in batches():
            base(**inputs).loss.backward()

    peft.preprocess_loraga(base, lora_config=config, train_step=train_step, cache_file=str(tmp_path / "g"))
    same(peft.get_peft_model(base, config), ours)
    again = transformer("llama")
    peft.preprocess_loraga(again, config, lambda: None, tmp_path / "g")
    same(peft.get_peft_model(again, config), ours)


def test_loftq_on_a_quantized_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "bitsandbytes")
    plain = transformer("llama", hidden_size=64, intermediate_size=128)
    plain.save_pretrained(tmp_path)
    base = transformer("llama", hidden_size=64, intermediate_size=128)
    for block in base.model.layers:
        block.self_attn.q_proj = quantized(block.self_attn.q_proj, "nf4")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    seen = []

    def callback(given: nn.Module, name: str) -> bool:
        assert given is model
        seen.append(name)
        return True

    with torch.no_grad():
        y = plain(**batch("llama")).logits
        before = float((model(**batch("llama")).logits - y).norm())
        peft.replace_lora_weights_loftq(model, model_path=str(tmp_path), callback=callback)
        assert float((model(**batch("llama")).logits - y).norm()) < before
    assert seen == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


class TestSignatures:
    """The arguments of PEFT's functions, by name and in their order."""

    @pytest.mark.parametrize(
        ("place", "name"),
        [
            ("tuners.lora.eva", "initialize_lora_eva_weights"),
            ("tuners.lora.eva", "get_eva_state_dict"),
            ("tuners.lora.corda", "preprocess_corda"),
            ("tuners.lora.loraga", "preprocess_loraga"),
            ("utils.loftq_utils", "replace_lora_weights_loftq"),
        ],
    )
    def test_are_the_same(self, place: str, name: str) -> None:
        pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")
        theirs = getattr(importlib.import_module(f"peft.{place}"), name)
        ours = getattr(peft, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
        if "utils" not in place:
            assert getattr(importlib.import_module(f"lorica.peft.{place}"), name) is ours

    def test_everything_that_the_package_of_lora_exports_and_is_carried(self) -> None:
        theirs = pytest.importorskip("peft.tuners.lora", reason="needs PEFT: pip install 'lorica[peers]'")
        ours = importlib.import_module("lorica.peft.tuners.lora")
        absent = {name for name in theirs.__all__ if not hasattr(ours, name)}
        assert absent == {
            *("ArrowConfig", "BdLoraConfig", "KasaConfig", "MontecloraConfig", "VeloraConfig"),
            *("GPTQLoraLinear", "convert_to_lora", "save_as_lora", "create_arrow_model"),
        }


class TestTakenOut:
    """Values of an adapter whose start was taken out of W0: an update of W0, of twice the rank."""

    @pytest.fixture(params=["pissa", "olora"])
    def model(self, request: pytest.FixtureRequest) -> peft.PeftModel:
        config = peft.LoraConfig(
            r=2, target_modules=TARGETS, init_lora_weights=request.param, modules_to_save=["norm"]
        )
        return peft.get_peft_model(transformer("llama"), config).eval()

    @staticmethod
    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        return model(**batches(1)[0]).logits

    @pytest.mark.parametrize("acting", [True, False])
    def test_the_values_come_back(self, model: peft.PeftModel, acting: bool) -> None:
        shake(model, 1)
        first = self.logits(model)
        values = {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
        shake(model, 2)
        assert not torch.allclose(self.logits(model), first, atol=1e-3)
        if not acting:
            model.base_model.disable_adapter_layers()
        found = peft.set_peft_model_state_dict(model, values)
        model.base_model.enable_adapter_layers()
        assert found == ([], [])
        torch.testing.assert_close(self.logits(model), first, atol=1e-5, rtol=1e-4)

    def test_it_trains_on_as_it_did(self, model: peft.PeftModel, tmp_path: Path) -> None:
        shake(model, 1)
        model.save_pretrained(tmp_path)
        wanted = {key: p.shape for key, p in model.named_parameters() if p.requires_grad}
        fresh = peft.get_peft_model(transformer("llama"), peft.LoraConfig(r=2, target_modules=TARGETS))
        fresh.load_adapter(tmp_path, "again", is_trainable=True)
        fresh.set_adapter("again")
        whole = peft.PeftModel.from_pretrained(transformer("llama"), tmp_path, is_trainable=True)
        for name, again in (("default", whole), ("again", fresh)):
            trains = {key: p.shape for key, p in again.named_parameters() if p.requires_grad}
            assert trains == {key.replace("default", name): shape for key, shape in wanted.items()}
            config = again.peft_config[name]
            assert config.replace(inference_mode=False) == model.peft_config["default"]
            config.base_model_name_or_path = "it/can/be/assigned"
            torch.testing.assert_close(self.logits(again), self.logits(model), atol=1e-5, rtol=1e-4)

    def test_those_that_train_alone(self, model: peft.PeftModel) -> None:
        shake(model, 1)
        first = self.logits(model)
        values = {
            key.replace(".modules_to_save", "").replace(".default", ""): value.detach().clone()
            for key, value in model.named_parameters()
            if value.requires_grad
        }
        shake(model, 2)
        assert peft.set_peft_model_state_dict(model, values) == ([], [])
        torch.testing.assert_close(self.logits(model), first, rtol=0, atol=0)

    def test_what_cannot_be_changes_nothing(self, model: peft.PeftModel) -> None:
        values = {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
        before = {key: value.clone() for key, value in model.state_dict().items()}
        next(value for key, value in values.items() if "norm" in key).fill_(3)
        broken = {**values, next(iter(values)): torch.full_like(next(iter(values.values())), float("nan"))}
        with pytest.raises(AdapterError, match="NaN"):
            peft.set_peft_model_state_dict(model, broken)
        with pytest.raises(AdapterError, match="do not fit"):
            peft.set_peft_model_state_dict(model, {**values, next(iter(values)): torch.zeros(3, 3)})
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        model.merge_adapter()
        with pytest.raises(StateError, match="is merged"):
            peft.set_peft_model_state_dict(model, values)
