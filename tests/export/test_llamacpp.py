"""llama.cpp itself reads base and adapter, and computes what torch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_gguf import FAMILIES, trained
from torch import Tensor

import lorica
from lorica.export import write_gguf

gguf: Any = pytest.importorskip("gguf", reason="needs lorica[export]")
llama: Any = pytest.importorskip("xllamacpp", reason="needs xllamacpp")

PROMPT = [5, 9, 17, 4, 30, 11]


def write_base(model: Any, name: str, path: Path) -> None:
    """A base as llama.cpp's own converter lays it out, in float32, with tokens that mean nothing."""
    config = model.config
    arch = getattr(gguf.MODEL_ARCH, FAMILIES[name][1].upper())
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(16)
    writer.add_embedding_length(16)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if name == "gpt2":
        writer.add_feed_forward_length(64)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(4)
        writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"▁{chr(97 + i)}" for i in range(29))])
    writer.add_token_scores([0.0] * 32)
    writer.add_token_types([2, 3, 3, *[1] * 29])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, tensor in model.state_dict().items():
        place = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if place is None or (key == "lm_head.weight" and config.tie_word_embeddings):
            continue
        value = tensor.float()
        if name == "gpt2" and value.dim() == 2 and ".c_" in key:
            value = value.t()  # Conv1D
        if name == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(place, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def served(base: Path, adapter: Path | None) -> Tensor:
    """Log-probabilities of the token after the prompt, by llama.cpp."""
    params = llama.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_predict, params.n_parallel = 16, 1, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.warmup = False
    if adapter is not None:
        info = llama.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    server = llama.Server(params)
    answer = server.handle_completions({"prompt": PROMPT, "max_tokens": 1, "n_probs": 32, "logprobs": 32})
    (first,) = answer["choices"][0]["logprobs"]["content"]
    found = torch.full((32,), torch.nan)
    for each in first["top_logprobs"]:
        found[each["id"]] = each["logprob"]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_logits(name: str, tmp_path: Path) -> None:
    fields = {"rank_pattern": {"(down_proj|c_fc)": 2}, "alpha_pattern": {r".*\.0\..*": 3}, "use_rslora": True}
    model, adapter = trained(name, **fields)
    write_gguf(adapter, model.config.to_dict(), tmp_path / "adapter.gguf")
    model.eval()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
        lorica.detach(model)
        plain = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    write_base(model, name, tmp_path / "base.gguf")
    torch.testing.assert_close(served(tmp_path / "base.gguf", None), plain, rtol=1e-4, atol=1e-4)
    found = served(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.05
