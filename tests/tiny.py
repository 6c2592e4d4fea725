"""Tiny models of real architectures, built from their configurations, and a record of what a model is."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lorica

VOCABULARY = 40


class Toy(nn.Module):
    """A model of plain torch layers, with one of each name that tests like to target."""

    def __init__(self, dim: int = 6, blocks: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim, dtype=dtype)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"up": nn.Linear(dim, 2 * dim, dtype=dtype), "down": nn.Linear(2 * dim, dim, dtype=dtype)}
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(dim, dtype=dtype)
        self.head = nn.Linear(dim, 3, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(self.norm(x).mean(1))


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LENGTH = {"max_position_embeddings": 20}
# Name → configuration class, model class, and what makes it small.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", _SMALL | _TEXT | _LENGTH),
    "bert-classifier": ("BertConfig", "BertForSequenceClassification", _SMALL | _TEXT | _LENGTH),
    "bert-masked": ("BertConfig", "BertForMaskedLM", _SMALL | _TEXT | _LENGTH),
    "bert-tokens": ("BertConfig", "BertForTokenClassification", _SMALL | _TEXT | _LENGTH),
    "bert-answers": ("BertConfig", "BertForQuestionAnswering", _SMALL | _TEXT | _LENGTH),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _SMALL | _TEXT | _LENGTH),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24} | _TEXT | _LENGTH,
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20} | _TEXT,
    ),
    "gpt2-classifier": (
        "GPT2Config",
        "GPT2ForSequenceClassification",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20} | _TEXT,
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SMALL | _TEXT | _LENGTH),
    "llama-classifier": ("LlamaConfig", "LlamaForSequenceClassification", _SMALL | _TEXT | _LENGTH),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {"num_key_value_heads": 1, "sliding_window": 24} | _SMALL | _TEXT | _LENGTH,
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        | _TEXT,
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _SMALL | _TEXT | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _SMALL
        | _TEXT
        | {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 12}
        | {"num_experts_per_tok": 2},
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        _SMALL
        | _TEXT
        | {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"layer_types": ["full_attention"] * 2},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        _SMALL
        | _TEXT
        | {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 2} | _TEXT),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
        }
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | _TEXT
        | _LENGTH,
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", _SMALL | {"image_size": 8, "patch_size": 4}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {"ffn_dim": 24, "word_embed_proj_dim": 16} | _SMALL | _TEXT | _LENGTH,
    ),
}


def transformer(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A tiny transformers model in evaluation mode; the same name and seed give the same weights."""
    transformers = pytest.importorskip("transformers")
    config, model, small = _MODELS[name]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**small | settings)).to(dtype).eval()


def batch(name: str = "bert", rows: int = 3) -> dict[str, Tensor]:
    """Inputs for a `transformer` of that name."""
    draw = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=draw)}
    tokens = torch.randint(3, VOCABULARY, (rows, 7), generator=draw)
    return {"input_ids": tokens, **({"decoder_input_ids": tokens[:, :4]} if name == "t5" else {})}


def tokens(rows: int = 3) -> Tensor:
    """Inputs for a `Toy`."""
    return batch(rows=rows)["input_ids"]


@torch.no_grad()
def outputs(model: nn.Module, name: str = "bert") -> Tensor:
    """What a `transformer` or `Toy` computes from its inputs: its logits, or else its last hidden state."""
    if not hasattr(model, "config"):
        return model(tokens())
    result = model(**batch(name))
    return next(result[key] for key in ("logits", "start_logits", "last_hidden_state") if key in result)


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Add noise to all that trains, as training would: B leaves zero, heads and biases their start."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=draw)


def adapted(
    model: nn.Module, config: lorica.AdapterConfig, name: str = "default", seed: int = 0
) -> nn.Module:
    """The model with one more adapter, that differs from its start and is the only one acting."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lorica.adapt(model, config, name, seed=seed)
    shake(model, seed)
    return model


class Record(NamedTuple):
    """What a model is: compare two with ``==``."""

    classes: list[tuple[str, type[nn.Module]]]
    attributes: list[tuple[str, tuple[str, ...]]]
    keys: list[str]
    tensors: list[tuple[str, int]]
    requires_grad: list[bool]
    values: list[bytes]


def record(model: nn.Module) -> Record:
    """Classes, attributes, keys, tensors by identity, what trains, and every value."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return Record(
        [(path, type(module)) for path, module in model.named_modules()],
        [(path, tuple(module.__dict__)) for path, module in model.named_modules()],
        list(model.state_dict()),
        [(path, id(tensor)) for path, tensor in named],
        [tensor.requires_grad for _, tensor in named],
        [bits(tensor) for _, tensor in named],
    )


def bits(tensor: Tensor) -> bytes:
    """A tensor's memory, so that equal means equal to the bit."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
