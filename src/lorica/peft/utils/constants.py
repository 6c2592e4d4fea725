"""Names that scripts import from `peft.utils.constants`, with PEFT's values."""

from __future__ import annotations

from lorica.checkpoint.peft import CONFIG_FILE as CONFIG_NAME
from lorica.checkpoint.peft import PICKLED_FILE as WEIGHTS_NAME
from lorica.checkpoint.peft import WEIGHTS_FILE as SAFETENSORS_WEIGHTS_NAME

__all__ = ["CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"]

EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}

_SHARED = {
    ("q", "v"): "t5 mt5",
    (
        "q_proj",
        "v_proj",
    ): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("Wqkv",): "mpt",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING: dict[str, list[str] | str] = {
    **{model: list(names) for names, models in _SHARED.items() for model in models.split()},
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
"""Model type → modules that PEFT adapts where `target_modules` is None."""
