"""Files for models whose modules transformers renamed since (4.51's Gemma 3 and LLaVA), on today's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import shake

import lorica
import lorica.peft
from lorica import LoraConfig

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**TEXT, "sliding_window": 4, "query_pre_attn_scalar": 8}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    special: dict[str, Any] = {"image_token_index": 39, "boi_token_index": 37, "eoi_token_index": 38}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **special)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {**TEXT, "model_type": "llama"}
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=39)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


MODELS = {"gemma3": gemma3, "llava": llava}

# Names now → names in transformers 4.51.
BEFORE = {
    r"model\.vision_tower\.": "vision_tower.vision_model.",
    r"model\.multi_modal_projector\.": "multi_modal_projector.",
    r"model\.language_model\.": "language_model.model.",
    r"lm_head\b": "language_model.lm_head",
}


def renamed(name: str) -> str:
    for now, before in BEFORE.items():
        if re.match(now, name):
            return re.sub(f"^{now}", before, name)
    return name


def as_before(folder: Path, **settings: Any) -> Path:
    """Give an adapter's file the names of transformers 4.51, and its configuration the settings of then."""
    file, head = folder / "adapter_model.safetensors", "base_model.model."
    tensors = {head + renamed(key.removeprefix(head)): tensor for key, tensor in load_file(file).items()}
    assert any(key.startswith(f"{head}language_model.model.layers.0.") for key in tensors)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


@torch.no_grad()
def computed(model: Any) -> list[torch.Tensor]:
    ids = torch.tensor([[4, 11, 13, 5]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [model(input_ids=ids).logits, inner.model.vision_tower(pixels).last_hidden_state]


REGEX = r".*language_model.*\.(q_proj|down_proj)"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "names": ({"target_modules": ["q_proj", "down_proj"]}, {}),
    "all": ({"target_modules": "all-linear"}, {}),
    "regex": ({"target_modules": REGEX}, {"target_modules": r"language_model.*\.(q_proj|down_proj)"}),
    "paths": (
        {"target_modules": ["model.language_model.layers.0.self_attn.q_proj", "1.mlp.up_proj"]},
        {"target_modules": ["language_model.model.layers.0.self_attn.q_proj", "1.mlp.up_proj"]},
    ),
    "ranks": (
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {"model.language_model.layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"model.language_model.layers.0.self_attn.q_proj": 7},
        },
        {
            "rank_pattern": {"language_model.model.layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"language_model.model.layers.0.self_attn.q_proj": 7},
        },
    ),
    "whole": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}),
    "whole by its path": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["language_model.lm_head"]},
    ),
    "DoRA": ({"target_modules": ["q_proj", "v_proj"], "use_dora": True}, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_before_computes_the_same(tmp_path: Path, name: str, case: str) -> None:
    fields, before = CASES[case]
    model = lorica.adapt(MODELS[name](), LoraConfig(r=2, lora_alpha=4, **fields))
    base = computed(MODELS[name]())
    shake(model)
    expected = computed(model)
    assert not torch.equal(expected[0], base[0])
    folder = as_before(lorica.save(model, tmp_path / "adapter"), **before)
    for load in (lorica.load, lorica.peft.PeftModel.from_pretrained):
        for came, right in zip(computed(load(MODELS[name](), str(folder))), expected, strict=True):
            assert torch.equal(came, right)
    again = lorica.load(MODELS[name](), folder, trainable=True)
    lorica.save(again, tmp_path / "again")
    for load in (lorica.load, peft.PeftModel.from_pretrained):
        found = computed(load(MODELS[name](), str(tmp_path / "again")))
        for came, right in zip(found, expected, strict=True):
            torch.testing.assert_close(came, right)
