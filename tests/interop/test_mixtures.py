"""Mixtures of experts whose modules transformers 5 made parameters: trained as by PEFT, files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import save_file
from tiny import shake
from torch import nn

import lorica
import lorica.peft
from lorica.checkpoint.peft_tensors import to_tensors
from lorica.errors import TargetError
from lorica.pieces.plugins.architectures import BY_TYPE

# PEFT warns of its own patterns for parameters, and of what transformers will rename.
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(1, 8).reshape(1, 7)
SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "head_dim": 4,
}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    base = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        shake(base)
    return base


def names(module: nn.Module, name: str) -> dict[str, torch.Size]:
    """What trains, by PEFT's keys."""
    state = peft.get_peft_model_state_dict(module, adapter_name=name)  # type: ignore[arg-type]
    return {key: tensor.shape for key, tensor in state.items()}


TARGETS: list[tuple[str, Any]] = [
    ("Mixtral", "all-linear"),
    ("Mixtral", ["q_proj", "w1", "w2", "w3"]),
    ("Mixtral", ["v_proj", "gate", "w2"]),
    ("Mixtral", r".*\.(q_proj|w1|w3)"),
    ("Mixtral", r".*\.(q_proj|v_proj)"),
    ("Qwen3Moe", "all-linear"),
    ("Qwen3Moe", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    ("Qwen3Moe", r".*\.(k_proj|gate_proj|up_proj|down_proj)"),
    ("Olmoe", "all-linear"),
    ("Llama", "all-linear"),
]


@pytest.mark.parametrize(("kind", "targets"), TARGETS)
def test_what_trains_and_its_files_are_pefts(kind: str, targets: Any, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        model(kind), peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    )
    expected = names(theirs, "default")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    out = theirs(IDS).logits

    ours = lorica.adapt(model(kind), lorica.LoraConfig(r=2, lora_alpha=3, target_modules=targets), seed=0)
    assert {k: v.shape for k, v in to_tensors(lorica.extract(ours)).items()} == expected

    read = lorica.load(model(kind), tmp_path / "theirs")
    torch.testing.assert_close(read(IDS).logits, out, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    lorica.save(ours, tmp_path / "ours")
    back = lorica.load(model(kind), tmp_path / "ours")
    assert torch.equal(back(IDS).logits, ours(IDS).logits)
    again = peft.PeftModel.from_pretrained(model(kind), tmp_path / "ours")
    torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-5)


def test_half_of_a_fused_weight_is_refused() -> None:
    with pytest.raises(TargetError, match="w1 without w3"):
        lorica.adapt(model("Mixtral"), lorica.LoraConfig(target_modules=["q_proj", "w1"]))


@pytest.mark.parametrize("patterns", [{}, {"gate_up_proj": 4}, {"down_proj": 4}])
@pytest.mark.parametrize("alphas", [{}, {"gate_up_proj": 5}, {"down_proj": 7}])
def test_parameters_of_one_module_with_ranks_and_alphas_of_their_own(
    patterns: dict[str, int], alphas: dict[str, int], tmp_path: Path
) -> None:
    config = {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": patterns,
        "alpha_pattern": alphas,
        "init_lora_weights": False,
    }
    theirs = peft.get_peft_model(model("Mixtral"), peft.LoraConfig(**config))  # pyright: ignore[reportArgumentType]
    theirs.save_pretrained(str(tmp_path / "theirs"))
    read = lorica.load(model("Mixtral"), tmp_path / "theirs")
    torch.testing.assert_close(read(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    lorica.save(read, tmp_path / "ours")
    assert torch.equal(lorica.load(model("Mixtral"), tmp_path / "ours")(IDS).logits, read(IDS).logits)


def test_files_of_single_experts_are_put_together(tmp_path: Path) -> None:
    """As transformers 4 had them: each expert's three weights, and the router, a layer of its own."""
    r, scale, drawn = 2, 1.5, torch.Generator().manual_seed(3)
    tensors, base = {}, model("Mixtral")
    before = copy.deepcopy(base)
    shapes = {"w1": (12, 8), "w3": (12, 8), "w2": (8, 12)}
    with torch.no_grad():
        for block in range(2):
            mlp = before.get_submodule(f"model.layers.{block}.mlp")
            old = f"base_model.model.model.layers.{block}.block_sparse_moe"
            for e in range(3):
                changes = {}
                for name, (d_out, d_in) in shapes.items():
                    A, B = torch.randn(r, d_in, generator=drawn), torch.randn(d_out, r, generator=drawn)
                    tensors[f"{old}.experts.{e}.{name}.lora_A.weight"] = A
                    tensors[f"{old}.experts.{e}.{name}.lora_B.weight"] = B
                    changes[name] = scale * B @ A
                mlp.experts.gate_up_proj[e] += torch.cat([changes["w1"], changes["w3"]])
                mlp.experts.down_proj[e] += changes["w2"]
            A, B = torch.randn(r, 8, generator=drawn), torch.randn(3, r, generator=drawn)
            tensors[f"{old}.gate.lora_A.weight"], tensors[f"{old}.gate.lora_B.weight"] = A, B
            mlp.gate.weight += scale * B @ A
    fields = {"peft_type": "LORA", "r": r, "lora_alpha": 3, "target_modules": ["gate", "w1", "w2", "w3"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    read = lorica.load(base, tmp_path)
    torch.testing.assert_close(read(IDS).logits, before(IDS).logits, rtol=1e-4, atol=1e-5)
    through = lorica.peft.PeftModel.from_pretrained(model("Mixtral"), tmp_path)
    torch.testing.assert_close(through(IDS).logits, before(IDS).logits, rtol=1e-4, atol=1e-5)
    lorica.save(read, tmp_path / "new")
    assert torch.equal(lorica.load(model("Mixtral"), tmp_path / "new")(IDS).logits, read(IDS).logits)


def test_default_targets_are_pefts() -> None:
    assert BY_TYPE == TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def test_a_name_in_full_is_meant_whatever_block_is_chosen() -> None:
    config = {"r": 2, "target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}
    theirs = peft.get_peft_model(model("Llama"), peft.LoraConfig(**config))  # pyright: ignore[reportArgumentType]
    ours = lorica.adapt(model("Llama"), lorica.LoraConfig(**config))  # pyright: ignore[reportArgumentType]
    tensors = to_tensors(lorica.extract(ours))
    assert tensors.keys() == {key for key in names(theirs, "default") if "lora_" in key}  # tables beside them
    assert any("lm_head" in key for key in tensors)
