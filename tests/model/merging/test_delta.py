"""The delta weight is what merging adds: for every kind of layer, start and variant."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import packing
import pytest
import torch
from kinds import KINDS
from tiny import Toy, record, shake, transformer
from torch import Tensor, nn

import lorica
from lorica import LoraConfig
from lorica.errors import AdapterError, StateError, TargetError
from lorica.layers import lora_layers

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq"},
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
}


def added_by_merging(model: nn.Module, names: str | tuple[str, ...]) -> dict[str, Tensor]:
    """Weight's name → merged less W0, in float32 or better."""
    twin = copy.deepcopy(model)
    lorica.merge(twin, names)
    merged = {name: p.detach().clone() for name, p in twin.named_parameters(remove_duplicate=False)}
    before = dict(lorica.detach(lorica.restore(twin)).named_parameters(remove_duplicate=False))
    precise = {name: torch.promote_types(p.dtype, torch.float32) for name, p in before.items()}
    return {name: merged[name].to(d) - before[name].detach().to(d) for name, d in precise.items()}


CASES = [
    (kind, variant)
    for kind, made in KINDS.items()
    for variant, fields in VARIANTS.items()
    if made.decomposes or "init_lora_weights" not in fields
]


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_exactly_what_merging_adds(kind: str, variant: str) -> None:
    model, targets = KINDS[kind].make(), [*KINDS[kind].targets]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, **VARIANTS[variant])
    shake(lorica.adapt(model, config))
    before, expected = record(model), added_by_merging(model, "default")
    for path, layer in lora_layers(model).items():
        found = lorica.delta_weight(model, path)
        assert found.shape == layer.base_shape
        assert found.dtype == torch.float32
        assert torch.equal(found, expected[f"{path}.{layer.weight_name}"])
        assert torch.equal(lorica.delta_weight(model, f"{path}.{layer.weight_name}", "default"), found)
        if variant in ("lora", "rslora"):
            torch.testing.assert_close(found, oracle.delta(layer, "default"))
    assert record(model) == before


def toy(dtype: torch.dtype = torch.float32) -> Toy:
    model = Toy(dtype=dtype)
    shake(lorica.adapt(model, LoraConfig(r=2, target_modules=["up", "down"], lora_bias=True), "one", seed=0))
    shake(lorica.adapt(model, LoraConfig(r=2, target_modules=["up"], use_dora=True), "two", seed=1), 1)
    lorica.adapt(model, LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa"), "three", seed=2)
    shake(model, 2)
    lorica.active(model, "one")
    return model


@pytest.mark.parametrize("names", ["one", "two", "three", ("one", "two"), ("two", "three"), ("one", "three")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_and_those_that_do_not_act(names: str | tuple[str, ...], dtype: torch.dtype) -> None:
    model = toy(dtype)
    before, expected = record(model), added_by_merging(model, names)
    assert torch.equal(lorica.delta_weight(model, "blocks.1.up", names), expected["blocks.1.up.weight"])
    if "one" in names:
        assert torch.equal(
            lorica.delta_weight(model, "blocks.1.up.bias", names), expected["blocks.1.up.bias"]
        )
    assert record(model) == before


def test_the_active_or_the_merged_ones_are_meant() -> None:
    model = toy()
    expected = {name: lorica.delta_weight(model, "blocks.0.up", name) for name in ("one", "two", "three")}
    assert torch.equal(lorica.delta_weight(model, "blocks.0.up"), expected["one"])
    lorica.merge(model, "three")
    merged = record(model)
    assert torch.equal(lorica.delta_weight(model, "blocks.0.up"), expected["three"])
    for name, delta in expected.items():
        assert torch.equal(lorica.delta_weight(model, "blocks.0.up", name), delta)
    assert record(model) == merged
    lorica.restore(model)
    with lorica.disabled(model), pytest.raises(AdapterError, match="no adapter is active"):
        lorica.delta_weight(model, "blocks.0.up")


def test_before_it_is_rounded() -> None:
    model = toy(torch.bfloat16)
    W0 = lorica.detach(copy.deepcopy(model)).get_parameter("blocks.0.up.weight")
    found = lorica.delta_weight(model, "blocks.0.up", "one")
    assert found.dtype == torch.float32
    lorica.merge(model, "one")
    assert torch.equal(model.get_parameter("blocks.0.up.weight"), (W0.float() + found).bfloat16())


def test_experts_are_named_by_their_parameter() -> None:
    model = transformer("mixtral")
    shake(lorica.adapt(model, LoraConfig(r=2, target_modules="all-linear")))
    expected = added_by_merging(model, "default")
    for leaf in ("gate_up_proj", "down_proj"):
        path = f"model.layers.0.mlp.experts.{leaf}"
        assert torch.equal(lorica.delta_weight(model, path), expected[path])
    with pytest.raises(TargetError, match=r"say which weight is meant: .*gate_up_proj, .*down_proj"):
        lorica.delta_weight(model, "model.layers.0.mlp.experts")


def test_of_a_packed_weight() -> None:
    model = nn.Sequential(packing.quantized(nn.Linear(64, 64), "nf4"))
    shake(lorica.adapt(model, LoraConfig(r=2, target_modules=["0"])))
    W0 = lora_layers(model)["0"].base_rows(slice(None))
    found = lorica.delta_weight(model, "0")
    lorica.merge(model, into="dequantized")
    assert torch.equal(model.get_parameter("0.weight").float() - W0, found)
    with pytest.raises(StateError, match="packed weights are merged; call"):
        lorica.delta_weight(model, "0")


def test_what_is_refused() -> None:
    model = toy()
    with pytest.raises(TargetError, match=r"is at 'blocks\.0\.upp'; did you mean 'blocks\.0\.up'"):
        lorica.delta_weight(model, "blocks.0.upp")
    with pytest.raises(TargetError, match="no adapted layer is at 'head'"):
        lorica.delta_weight(model, "head")
    with pytest.raises(TargetError, match=r"blocks\.0\.up\.scale is changed by no adapter"):
        lorica.delta_weight(model, "blocks.0.up.scale")
    with pytest.raises(AdapterError, match=r"blocks\.0\.down: 'two' has no update there"):
        lorica.delta_weight(model, "blocks.0.down", "two")
    with pytest.raises(AdapterError, match="no adapter is named 'ones'; did you mean 'one'"):
        lorica.delta_weight(model, "blocks.0.up", "ones")
    with pytest.raises(StateError, match="carries no adapter"):
        lorica.delta_weight(Toy(), "blocks.0.up")
    grouped = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    shake(lorica.adapt(grouped, LoraConfig(r=2, target_modules=["0"])))
    with pytest.raises(StateError, match="2 groups cannot be merged"):
        lorica.delta_weight(grouped, "0")
