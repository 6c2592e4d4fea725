"""Another adapter under the same name, without compiling anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import Toy, shake, tokens
from torch import Tensor, nn

from lorica.errors import AdapterError, ConfigError, StateError
from lorica.peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from lorica.peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def wrapped(seed: int, **settings: Any) -> PeftModel:
    model = get_peft_model(
        toy(), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]} | settings)
    )
    shake(model, seed)
    return model.eval()


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    return model(tokens())


OTHERS: list[dict[str, Any]] = [
    {},
    {"r": 2},
    {"r": 2, "lora_alpha": 16},
    {"r": 7},
    {"use_rslora": True},
    {"target_modules": ["up"]},
    {"target_modules": ["up", "head"]},
    {"rank_pattern": {"down": 1}, "alpha_pattern": {"up": 3}},
    {"modules_to_save": ["norm"]},
    {"use_dora": True},
    {"bias": "lora_only"},
]


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_the_other_adapter_acts_as_on_a_model_of_its_own(settings: dict[str, Any], tmp_path: Path) -> None:
    other = wrapped(2, **settings)
    other.save_pretrained(tmp_path)
    model = wrapped(1)
    assert not torch.allclose(outputs(model), outputs(other), atol=1e-3)
    hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    torch.testing.assert_close(outputs(model), outputs(other))
    assert list(model.peft_config) == ["default"]
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(toy(), tmp_path / "again")), outputs(other))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_in_place_of_one_whose_start_was_taken_out_of_the_base(start: str, tmp_path: Path) -> None:
    other = wrapped(2, r=2)
    other.save_pretrained(tmp_path)
    model = wrapped(1, init_lora_weights=start)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(outputs(model), outputs(other))


@pytest.mark.parametrize("name", ["default", "0", "1"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"target_modules": ["embed"]}], ids=str)
def test_from_tensors(settings: dict[str, Any], name: str) -> None:
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["up", "down"]} | settings)
    other, model = (get_peft_model(toy(), config, name).eval() for _ in range(2))
    shake(other, 2)
    tensors = {key: p.detach() for key, p in other.named_parameters() if "lora_" in key}
    hotswap_adapter_from_state_dict(model, tensors, name, config)
    torch.testing.assert_close(outputs(model), outputs(other))


def test_renamed_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = wrapped(2)
    other.save_pretrained(tmp_path)
    old = {key.replace(".up.", ".raise."): tensor for key, tensor in load_peft_weights(tmp_path).items()}
    save_file(old, tmp_path / "adapter_model.safetensors")
    monkeypatch.setattr(Toy, "_checkpoint_conversion_mapping", {r"\.raise\.": ".up."}, raising=False)
    model = wrapped(1)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(outputs(model), outputs(other))


def test_what_acts_and_trains_stays_so(tmp_path: Path) -> None:
    wrapped(2, r=6).save_pretrained(tmp_path)
    model = wrapped(1, inference_mode=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up"]))
    hotswap_adapter(model, tmp_path, "second")
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for p in model.parameters())
    hotswap_adapter(model, tmp_path, "default")
    assert model.active_adapters == ["default"]


def test_what_is_frozen_in_part_stays_so(tmp_path: Path) -> None:
    wrapped(2, r=6).save_pretrained(tmp_path)
    model = wrapped(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    hotswap_adapter(model, tmp_path, "default")
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}


def test_compiled_code_stays_valid(tmp_path: Path, unchecked_shapes: None) -> None:
    del unchecked_shapes
    others = [
        wrapped(2, r=2, lora_alpha=3),
        wrapped(3, r=8, lora_alpha=1),
        wrapped(4, target_modules=["down"]),
    ]
    for i, other in enumerate(others):
        other.save_pretrained(tmp_path / str(i))
    model = wrapped(1)
    before = outputs(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(outputs(model), before)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=False)
    torch.testing.assert_close(outputs(compiled), before)
    with torch.compiler.set_stance("fail_on_recompile"):
        for i, other in enumerate(others):
            hotswap_adapter(compiled, tmp_path / str(i), "default")
            torch.testing.assert_close(outputs(compiled), outputs(other))


@pytest.mark.parametrize("start", ["orthogonal", "gaussian", "pissa", "loftq"])
def test_filling_up_leaves_what_the_model_computes(start: str) -> None:
    model = wrapped(1, r=2, init_lora_weights=start)
    before = outputs(model)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    torch.testing.assert_close(outputs(model), before)


def test_a_base_that_was_quantized_for_a_rank_is_not_filled_up() -> None:
    model = wrapped(1, r=2, init_lora_weights="loftq", loftq_config={"loftq_iter": 4})
    before = outputs(model)
    with pytest.raises(AdapterError, match="make it with r=5"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)


class Grouped(nn.Module):
    """A convolution in two groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def grouped(seed: int, r: int) -> PeftModel:
    model = get_peft_model(Grouped(), LoraConfig(r=r, lora_alpha=3, target_modules=["conv"]))
    shake(model, seed)
    return model.eval()


@pytest.mark.parametrize("r", [2, 4, 8])
def test_grouped_convolutions_of_other_ranks(r: int, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 5, 5)
    model, other = grouped(1, 4), grouped(2, r)
    other.save_pretrained(tmp_path)
    before = model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(x), before)
    held = {id(p) for p in model.parameters()}
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), other(x))
    assert {id(p) for p in model.parameters()} == held  # written where the old values were
    with pytest.raises(ConfigError, match="original rank is larger"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(AdapterError, match="groups=2 to target rank 9, but the target rank is not divisible"):
        prepare_model_for_compiled_hotswap(model, target_rank=9)


@pytest.mark.parametrize("r", [2, 6])
def test_while_another_is_merged(r: int, tmp_path: Path) -> None:
    wrapped(2, r=r).save_pretrained(tmp_path)
    model = wrapped(1)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.merge_adapter(["other"])
    before = outputs(model)
    with pytest.raises(StateError, match="merged"):
        hotswap_adapter(model, tmp_path, "other")
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)
    assert model.base_model.merged_adapters == ["other"]
    model.unmerge_adapter()
    model.set_adapter("default")
    torch.testing.assert_close(outputs(model), outputs(wrapped(2, r=r)))


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    wide = get_peft_model(Toy(dim=8), LoraConfig(r=4, target_modules=["up", "down"]))
    shake(wide)
    wide.save_pretrained(tmp_path)
    model = wrapped(1)
    before = outputs(model)
    with pytest.raises(AdapterError, match="shape of"):
        hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)
    with pytest.raises(AdapterError, match="no adapter is named 'defualt'"):
        hotswap_adapter(model, tmp_path, "defualt")
    with pytest.raises(ConfigError, match="target rank 2, but the original rank is larger"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    assert load_peft_weights(tmp_path).keys()
