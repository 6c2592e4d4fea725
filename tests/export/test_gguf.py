from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lorica
from lorica.cli import main
from lorica.errors import AdapterError
from lorica.export import even, write_gguf

gguf = pytest.importorskip("gguf", reason="needs lorica[export]")

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
FAMILIES: dict[str, tuple[Any, str, dict[str, str]]] = {
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "llama",
        {
            "model.layers.1.self_attn.o_proj": "blk.1.attn_output",
            "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
        },
    ),
    "qwen2": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "qwen2",
        {"model.layers.1.self_attn.q_proj": "blk.1.attn_q", "model.layers.0.mlp.down_proj": "blk.0.ffn_down"},
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=32, n_positions=16)),
        "gpt2",
        {"transformer.h.1.attn.c_attn": "blk.1.attn_qkv", "transformer.h.0.mlp.c_fc": "blk.0.ffn_up"},
    ),
}


def trained(name: str, **fields: Any) -> tuple[Any, lorica.Adapter]:
    torch.manual_seed(0)
    model = FAMILIES[name][0]()
    settings: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False, **fields}
    lorica.adapt(model, lorica.LoraConfig(r=4, lora_alpha=6, **settings), seed=0)
    return model, lorica.extract(model)


def contents(path: Path) -> tuple[Any, dict[str, Tensor]]:
    reader = gguf.GGUFReader(path)
    return reader.fields, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


@pytest.mark.parametrize("name", FAMILIES)
def test_read_by_its_own_reader(name: str, tmp_path: Path) -> None:
    model, adapter = trained(name, rank_pattern={"(down_proj|c_fc)": 2}, use_rslora=True)
    fields, tensors = contents(write_gguf(adapter, model.config.to_dict(), tmp_path / "a.gguf"))
    _, architecture, places = FAMILIES[name]
    assert fields["general.architecture"].contents() == architecture
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    alpha = fields["adapter.lora.alpha"].contents()
    assert len(tensors) == 2 * len(adapter.factors)
    for path, place in places.items():
        A, B = tensors[f"{place}.weight.lora_a"], tensors[f"{place}.weight.lora_b"]
        f = adapter.factors[path]
        torch.testing.assert_close(alpha / A.shape[0] * B @ A, f.scale * f.B @ f.A)


def test_the_rows_of_llamas_queries_and_keys_follow_its_rotation(tmp_path: Path) -> None:
    """Attention scores: transformers' rotation of halves, llama.cpp's of pairs on the file's rows."""
    model, adapter = trained("llama")
    _, tensors = contents(write_gguf(adapter, model.config.to_dict(), tmp_path / "a.gguf"))
    x, heads = torch.randn(5, 16), {"q": 4, "k": 2}
    plain = even(adapter).factors
    halves, pairs = {}, {}
    for part, count in heads.items():
        f = plain[f"model.layers.0.self_attn.{part}_proj"]
        halves[part] = (x @ f.A.T @ f.B.T).unflatten(-1, (count, 4)).transpose(0, 1)
        A, B = (tensors[f"blk.0.attn_{part}.weight.lora_{side}"] for side in "ab")
        pairs[part] = (x @ A.T @ B.T).unflatten(-1, (count, 4)).transpose(0, 1)
        assert not torch.allclose(halves[part], pairs[part])
    cos, sin = model.model.rotary_emb(x[None], torch.arange(5)[None])
    q, k = (t[0] for t in apply_rotary_pos_emb(halves["q"][None], halves["k"][None], cos, sin))
    angles = torch.atan2(sin, cos)[0, :, :2]  # of the head's two pairs, by place
    turned = torch.polar(torch.ones_like(angles), angles)

    def turn(t: Tensor) -> Tensor:
        return torch.view_as_real(
            torch.view_as_complex(t.unflatten(-1, (2, 2)).contiguous()) * turned
        ).flatten(-2)

    expected = q @ k.repeat_interleave(2, 0).mT
    found = turn(pairs["q"]) @ turn(pairs["k"]).repeat_interleave(2, 0).mT
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_the_format_cannot_carry_is_refused_by_name(tmp_path: Path) -> None:
    model, adapter = trained("llama", use_dora=True, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.q_proj: DoRA"):
        write_gguf(adapter, model.config.to_dict(), tmp_path / "a.gguf")
    model, adapter = trained("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head\.weight: trained whole"):
        write_gguf(adapter, model.config.to_dict(), tmp_path / "a.gguf")
    model, adapter = trained("gpt2", target_modules=["lm_head"])
    with pytest.raises(AdapterError, match="lm_head is tied to the embedding"):
        write_gguf(adapter, model.config.to_dict(), tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match=r"written for llama, .* and the base is a bert"):
        write_gguf(adapter, {"model_type": "bert"}, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapter = trained("llama", use_rslora=True)
    model.config.save_pretrained(tmp_path / "base")
    lorica.write(adapter, tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--to", "gguf", "-o", str(tmp_path / "a.gguf")]
    assert main(command) == 1
    assert "name it with --base" in capsys.readouterr().err
    assert main([*command, "--base", str(tmp_path / "base")]) == 0
    assert len(contents(tmp_path / "a.gguf")[1]) == 2 * len(adapter.factors)
    to = [
        "export",
        str(tmp_path / "adapter"),
        "--to",
        "peft",
        "--base",
        "org/base",
        "-o",
        str(tmp_path / "peft"),
    ]
    assert main(to) == 0
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["use_rslora"], settings["base_model_name_or_path"]) == (False, "org/base")
