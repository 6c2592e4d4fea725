"""Default target modules: PEFT's own table, and usual names for other models."""

from __future__ import annotations

from lorica.find import BY_TYPE, QUERY_VALUE

# By the configuration's `model_type`, as in PEFT: a script without target_modules trains the same modules.
_BY_TYPE: dict[str, list[str] | str] = {
    "t5": ["q", "v"],
    "mt5": ["q", "v"],
    "bart": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "bloom": ["query_key_value"],
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
    "gptj": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value"],
    "gpt_neo": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "xlm-roberta": ["query", "value"],
    "electra": ["query", "value"],
    "deberta-v2": ["query_proj", "value_proj"],
    "deberta": ["in_proj"],
    "layoutlm": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "llama4": ["q_proj", "v_proj"],
    "chatglm": ["query_key_value"],
    "gpt_bigcode": ["c_attn"],
    "mpt": ["Wqkv"],
    "RefinedWebModel": ["query_key_value"],
    "RefinedWeb": ["query_key_value"],
    "falcon": ["query_key_value"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "mistral": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "stablelm": ["q_proj", "v_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "gemma": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "gemma3_text": ["q_proj", "v_proj"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}

_QUERY_VALUE: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),  # Qwen3-MoE, Whisper, CLIP
    ("query", "value"),  # ViT
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),  # DistilBERT
    ("q", "v"),
    ("to_q", "to_v"),  # diffusion models
    ("query_key_value",),
    ("qkv_proj",),  # Phi-3
    ("c_attn",),
    ("Wqkv",),  # ModernBERT
    ("qkv",),
)

BY_TYPE.update(_BY_TYPE)
QUERY_VALUE.extend(_QUERY_VALUE)
