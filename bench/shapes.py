"""Small models of several architectures with random weights, and the ways of adapting them, for `step.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import models
import torch
from models import NO_DROPOUT
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A model and its inputs.

    Args:
        name: as the report shows it.
        make: the model, all of whose weights train.
        linear: its linear layers, for LoRA.
        attention: of these, query and value; or the fused layer that holds them.
        rows: of a batch.
        length: tokens per row.
        patched: whether it takes images.
        replaceable: whether loralib's layers can be put in the place of its own.
    """

    name: str
    make: Callable[[], nn.Module]
    linear: list[str]
    attention: list[str]
    rows: int
    length: int
    patched: bool = False
    replaceable: bool = True

    def batch(self, model: nn.Module, rows: int, length: int) -> dict[str, Tensor]:
        """Random inputs on the model's device, without padding."""
        if not self.patched:
            found = models.tokens(model, rows, length)
            return {**found, "input_ids": found["input_ids"] % 1_000}
        parameter = next(model.parameters())
        drawn = torch.randn(rows, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": drawn.to(parameter.device, parameter.dtype)}


def _bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=1_000, num_hidden_layers=4, **NO_DROPOUT)
    return BertModel(config, add_pooling_layer=False)


def _llama(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=1_000,
            hidden_size=512,
            intermediate_size=1_408,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=2_048,
            use_cache=False,
        )
    )


def _gpt2() -> nn.Module:
    torch.manual_seed(0)
    dropped: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(vocab_size=1_000, n_embd=512, n_layer=4, n_head=8, use_cache=False, **dropped)
    return GPT2Model(config)


def _vit() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 1_536,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
    }
    return ViTModel(ViTConfig(**sizes, **NO_DROPOUT), add_pooling_layer=False)


VIT_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
MINILM = Shape("MiniLM (6×384)", models.minilm, models.ALL_LINEAR, models.QUERY_VALUE, 16, 64)
BERT = Shape("BERT (4×768)", _bert, models.ALL_LINEAR, models.QUERY_VALUE, 8, 64)
LLAMA = Shape("Llama (4×512, GQA, SwiGLU)", _llama, LLAMA_LINEAR, ["q_proj", "v_proj"], 4, 256)
SHORT_LLAMA = replace(LLAMA, make=partial(_llama, layers=2))
"""Half of it, which compiles in half the time."""
GPT2 = Shape(
    "GPT-2 (4×512, Conv1D)", _gpt2, ["c_attn", "c_proj", "c_fc"], ["c_attn"], 4, 256, replaceable=False
)
VIT = Shape("ViT (4×384, 197 patches)", _vit, VIT_LINEAR, ["q_proj", "v_proj"], 4, 197, patched=True)
