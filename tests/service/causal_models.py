"""Tiny causal models, and sequences to train them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY, CONTEXT = 96, 64


def llama(**settings: Any) -> nn.Module:
    """Llama, a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "num_key_value_heads": 1}
    chosen: dict[str, Any] = {**sizes, **more, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**{**chosen, **settings})).eval()


def gpt2() -> nn.Module:
    """GPT-2: Conv1D layers, a tied head, dropout that must not act."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()
