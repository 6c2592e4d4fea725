"""`replace_lora_weights_loftq`: A and B against the decomposition of what packing took away."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from packing import quantized
from tiny import batch, transformer
from torch import Tensor, nn

import lorica
from lorica.errors import AdapterError, ConfigError, FileError, StateError
from lorica.layers.quantized import dequantize
from lorica.model import starts


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def plain() -> Any:
    return transformer("llama", hidden_size=64, intermediate_size=128)


def packed(kind: str = "nf4") -> Any:
    """The same model with packed projections."""
    model = plain()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, quantized(child, kind))
    return model


SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}


def adapted(kind: str = "nf4", **more: Any) -> Any:
    return lorica.adapt(packed(kind), lorica.LoraConfig(**SETTINGS | more), seed=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plain().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def layers(model: Any) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if path.endswith(("q_proj", "down_proj"))}


def expected(path: str, layer: Any, r: int = 4) -> Tensor:
    """The nearest matrix of rank r to what packing took away."""
    lost = plain().get_submodule(path).weight - dequantize(layer)
    U, S, Vh = torch.linalg.svd(lost)
    return (U[:, :r] * S[:r]) @ Vh[:r]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_it_is_the_nearest_update(kind: str, use_rslora: bool, folder: Path) -> None:
    model = adapted(kind, use_rslora=use_rslora)
    starts.replace_lora_weights_loftq(model, folder)
    for path, layer in layers(model).items():
        A, B = layer.factor_parameters("default")
        torch.testing.assert_close(
            layer.scaling["default"] * B @ A, expected(path, layer), rtol=1e-4, atol=1e-5
        )
        assert A.requires_grad
        assert B.requires_grad


def test_outputs_come_closer_to_those_before_packing(folder: Path) -> None:
    model, reference = adapted(r=16, target_modules="all-linear"), plain()
    inputs = batch("llama")
    with torch.no_grad():
        y = reference(**inputs).logits
        before = float((model(**inputs).logits - y).norm())
        starts.replace_lora_weights_loftq(model, folder)
        assert float((model(**inputs).logits - y).norm()) < before


def test_with_magnitudes_the_sum_is_what_acts(folder: Path) -> None:
    model = adapted(use_dora=True)
    starts.replace_lora_weights_loftq(model, folder)
    for path, layer in layers(model).items():
        W = dequantize(layer) + expected(path, layer)
        torch.testing.assert_close(layer.magnitude_parameter("default"), W.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_the_callback_decides_layer_by_layer(folder: Path) -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    seen = []

    def keep(given: nn.Module, path: str) -> bool:
        assert given is model
        assert model.get_submodule(path).lora_B["default"].weight.any()
        seen.append(path)
        return "q_proj" in path

    starts.replace_lora_weights_loftq(model, folder, callback=keep)
    assert seen == list(layers(model))
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]) == ("down_proj" in name)


def test_files_in_shards_by_name_and_by_file(folder: Path, tmp_path: Path) -> None:
    model = adapted()
    starts.replace_lora_weights_loftq(model, folder)
    plain().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    bare = {name.removeprefix("model."): tensor for name, tensor in plain().state_dict().items()}
    safetensors.torch.save_file({k: v.clone() for k, v in bare.items()}, tmp_path / "bare.safetensors")
    named = adapted()
    named.name_or_path = str(folder)
    for other, place in (
        (adapted(), folder / "model.safetensors"),
        (adapted(), tmp_path / "sharded"),
        (adapted(), tmp_path / "bare.safetensors"),
        (named, None),
    ):
        starts.replace_lora_weights_loftq(other, place)
        for one, two in zip(layers(model).values(), layers(other).values(), strict=True):
            assert torch.equal(one.lora_A["default"].weight, two.lora_A["default"].weight)


class TestRefused:
    """Before anything is changed."""

    def test_a_plain_base(self, folder: Path) -> None:
        model = lorica.adapt(plain(), lorica.LoraConfig(**SETTINGS))
        with pytest.raises(StateError, match=r'no quantized layer.*init_lora_weights="loftq"'):
            starts.replace_lora_weights_loftq(model, folder)

    def test_no_such_adapter(self, folder: Path) -> None:
        with pytest.raises(AdapterError, match="no adapter is named 'other'"):
            starts.replace_lora_weights_loftq(adapted(), folder, "other")

    def test_a_model_that_does_not_say_where_it_is_from(self) -> None:
        with pytest.raises(ConfigError, match="give model_path"):
            starts.replace_lora_weights_loftq(adapted())

    def test_a_name_that_is_not_in_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("huggingface_hub")
        model = adapted()
        model.name_or_path = "nobody/nothing"
        with pytest.raises(FileError, match=r"'nobody/nothing'.*not in the Hub's cache; give model_path"):
            starts.replace_lora_weights_loftq(model)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match=r"should hold model\.safetensors"):
            starts.replace_lora_weights_loftq(adapted(), tmp_path)

    def test_weights_that_lack_layers_or_have_others_in_their_place(self, tmp_path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in plain().state_dict().items()}
        own = "model.layers.{}.self_attn.q_proj.weight"
        del tensors[own.format(0)]
        tensors[own.format(1)] = torch.zeros(3, 64)
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 128, dtype=torch.uint8)
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        model = adapted()
        before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
        with pytest.raises(AdapterError) as caught:
            starts.replace_lora_weights_loftq(model, tmp_path)
        for message in (
            "model.layers.0.self_attn.q_proj: no weight of that name",
            "model.layers.1.self_attn.q_proj: its shape is (64, 64), that of the files (3, 64)",
            "model.layers.0.mlp.down_proj.weight is U8, and so quantized itself",
        ):
            assert message in str(caught.value)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)

    def test_a_rank_that_the_weight_does_not_have(self, folder: Path) -> None:
        with pytest.raises(AdapterError, match="has 64 directions, and the rank is 70"):
            starts.replace_lora_weights_loftq(adapted(r=70), folder)
