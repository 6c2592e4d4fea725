"""Names that scripts import from `peft.utils.constants`, with PEFT's values."""

from __future__ import annotations

from lorica.checkpoint.peft import CONFIG_FILE as CONFIG_NAME
from lorica.checkpoint.peft import PICKLED_FILE as WEIGHTS_NAME
from lorica.checkpoint.peft import WEIGHTS_FILE as SAFETENSORS_WEIGHTS_NAME
from lorica.pieces.plugins.architectures import BY_TYPE

__all__ = ["CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"]

EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = BY_TYPE
"""Model type → modules adapted if `target_modules` is None; entries that scripts add count."""
