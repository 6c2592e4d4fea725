"""What other libraries ask an adapted layer, under PEFT's names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.errors import AdapterError, StateError
from lorica.layers import LoraLayer, LoraLinear
from lorica.model.merging.merged import as_unmerged, stay_adapted

transformers = pytest.importorskip("transformers")


class Own(nn.Linear):
    """A layer with attributes of the same names."""

    r = "its own"

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.merged = "its own too"


KINDS: dict[str, tuple[Any, Tensor, int, int]] = {
    "linear": (lambda: nn.Linear(4, 3), torch.randn(2, 4), 4, 3),
    "conv1d of transformers": (lambda: transformers.pytorch_utils.Conv1D(3, 4), torch.randn(2, 4), 4, 3),
    "embedding": (lambda: nn.Embedding(5, 3), torch.arange(5), 5, 3),
    "conv": (lambda: nn.Conv2d(4, 3, 2), torch.randn(2, 4, 5, 5), 4, 3),
}


def adapted(kind: str = "linear", **settings: Any) -> tuple[Any, Any, Tensor]:
    make, x, *_ = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    first: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["0"]}
    first.update(settings)
    second: dict[str, Any] = {"r": 4, "use_rslora": True}
    lorica.adapt(model, lorica.LoraConfig(**first), "one")
    lorica.adapt(model, lorica.LoraConfig(**{**first, **second}), "two")
    _fill(model)
    return model, model[0], x.double() if x.is_floating_point() else x


def _fill(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.4)


@pytest.mark.parametrize("kind", KINDS)
class TestOfEachKind:
    def test_the_base_layer_computes_what_the_base_does(self, kind: str) -> None:
        model, layer, x = adapted(kind)
        with lorica.disabled(model):
            base = model(x)
        torch.testing.assert_close(layer.base_layer(x), base, rtol=0, atol=0)
        assert type(layer.base_layer) is layer.base_class
        assert layer.get_base_layer().weight is layer.base_weight
        assert not torch.allclose(model(x), base)

    def test_what_is_assigned_to_the_base_layer_reaches_the_layer(self, kind: str) -> None:
        _, layer, _ = adapted(kind)
        layer.base_layer.weight = nn.Parameter(torch.zeros_like(layer.base_weight))
        assert not layer.base_weight.any()

    def test_the_delta_weight_is_what_merging_adds(self, kind: str) -> None:
        model, layer, _ = adapted(kind)
        W0, deltas = layer.base_weight.detach().clone(), [layer.get_delta_weight(n) for n in ("one", "two")]
        for names, delta in ((["one"], deltas[0]), (["one", "two"], sum(deltas))):
            lorica.merge(model, names)
            torch.testing.assert_close(model[0].weight.detach(), W0 + delta)
            lorica.restore(model)
        with pytest.raises(AdapterError, match="'three'"):
            layer.get_delta_weight("three")

    def test_what_it_says_of_its_adapters(self, kind: str) -> None:
        _, layer, _ = adapted(kind)
        assert layer.r == {"one": 2, "two": 4}
        assert layer.lora_alpha == {"one": 3, "two": 3}
        assert layer.use_rslora == {"one": False, "two": True}
        assert layer.use_dora == {"one": False, "two": False}
        assert (layer.in_features, layer.out_features) == KINDS[kind][2:]
        assert layer._all_available_adapter_names() == ["one", "two"]


class TestScale:
    def test_multiplied_divided_set_and_back(self) -> None:
        _, layer, _ = adapted()
        layer.scale_layer(2)
        layer.scale_layer(3)
        assert layer.scaling == {"one": 1.5, "two": pytest.approx(9)}  # two acts
        layer.unscale_layer(3)
        assert layer.scaling["two"] == pytest.approx(3)
        assert layer.lora_alpha == {"one": 3, "two": 3}
        layer.set_scale("two", 5)
        assert layer.scaling["two"] == pytest.approx(7.5)
        layer.set_scale("two", 0.5)
        layer.unscale_layer()
        assert layer.scaling == {"one": 1.5, "two": pytest.approx(1.5)}


class TestChoosing:
    def test_a_layer_switches_the_model(self) -> None:
        model, layer, x = adapted()
        with lorica.active(model, ["one", "two"]):
            both = model(x)
        layer.set_adapter(["one", "two"])
        torch.testing.assert_close(model(x), both, rtol=0, atol=0)
        assert layer.active_adapters == ["one", "two"]
        layer.set_adapter("one", inference_mode=True)
        assert layer.active_adapter == "one"
        assert not any(p.requires_grad for p in model.parameters())

    def test_disabled_and_enabled_again(self) -> None:
        model, layer, x = adapted()
        y = model(x)
        layer.enable_adapters(False)
        assert layer.disable_adapters
        assert layer.active_adapters == ["two"]
        torch.testing.assert_close(model(x), layer.base_layer(x), rtol=0, atol=0)
        layer.enable_adapters(True)
        assert not layer.disable_adapters
        torch.testing.assert_close(model(x), y, rtol=0, atol=0)

    def test_what_only_the_model_can_place_is_refused(self) -> None:
        model, layer, _ = adapted(bias="lora_only")
        with pytest.raises(StateError, match="'one', 'two' changes parameters of the base"):
            layer.set_adapter("one")
        assert layer.active_adapters == ["two"]
        lorica.active(model, "one")

    def test_an_unknown_one(self) -> None:
        with pytest.raises(AdapterError, match="'three'"):
            adapted()[1].set_adapter("three")


class TestMerged:
    def test_it_stays_an_adapted_layer_that_adds_nothing(self) -> None:
        model, layer, x = adapted()
        y, keys = model(x), list(model.state_dict())
        lorica.merge(model, "two")
        stay_adapted(model)
        torch.testing.assert_close(model(x), y)
        assert isinstance(layer, LoraLinear)
        assert list(model.state_dict()) == keys
        assert (layer.merged, layer.merged_adapters) == (True, ["two"])
        assert layer.active_adapters == ["two"]

    @pytest.mark.parametrize("stays", [True, False])
    def test_switching_and_restoring(self, stays: bool) -> None:
        model, layer, x = adapted()
        W0 = layer.base_weight
        with lorica.active(model, "one"):
            y = model(x)
        lorica.merge(model, "two")
        if stays:
            stay_adapted(model)
        lorica.switch(model, "one")
        torch.testing.assert_close(model(x), y)
        assert isinstance(layer, LoraLayer) == stays
        lorica.restore(model)
        assert layer.base_weight is W0
        assert not layer.merged

    def test_looking_at_it_as_it_was(self) -> None:
        model, layer, _ = adapted()
        W0 = layer.base_weight
        lorica.merge(model, "two")
        merged = model[0].weight
        with as_unmerged(model):
            assert layer.base_weight is W0
        assert model[0].weight is merged
        assert type(model[0]) is nn.Linear

    def test_one_layer_alone(self) -> None:
        _, layer, _ = adapted()
        for call in (layer.merge, layer.unmerge):
            with pytest.raises(StateError, match="one layer alone"):
                call()


def test_names_of_the_layers_own_go_first() -> None:
    model: Any = lorica.adapt(nn.Sequential(Own()), lorica.LoraConfig(r=2, target_modules=["0"]))
    assert model[0].r == "its own"
    assert model[0].merged == "its own too"
    assert model[0].lora_alpha == {"default": 8}
    assert copy.deepcopy(model)[0].r == "its own"
    lorica.detach(model)
    assert vars(model[0]).keys() == vars(Own()).keys()


def test_a_head_trained_whole() -> None:
    config = lorica.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    model: Any = lorica.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), config)
    head, x = model[1], torch.randn(2, 4)
    own = head._parameters["weight"]
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    assert not model(x).any()
    assert head.original_module.weight is own
    assert head.original_module(x).any()
    head.weight = nn.Parameter(torch.ones(3, 4))
    assert head.modules_to_save["default"].weight is head.weight
    with lorica.disabled(model):
        assert head.weight is own
    head.set_adapter("default", inference_mode=True)
    assert not head.weight.requires_grad
