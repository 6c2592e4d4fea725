"""Names of `peft.utils` that scripts import."""

from __future__ import annotations

from lorica.model.pretrained.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from lorica.peft.config import PeftType as PeftType
from lorica.peft.config import TaskType as TaskType
from lorica.peft.utils import integrations as integrations
from lorica.peft.utils.constants import CONFIG_NAME as CONFIG_NAME
from lorica.peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as INCLUDE_LINEAR_LAYERS_SHORTHAND
from lorica.peft.utils.constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from lorica.peft.utils.constants import TOKENIZER_CONFIG_NAME as TOKENIZER_CONFIG_NAME
from lorica.peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from lorica.peft.utils.constants import WEIGHTS_NAME as WEIGHTS_NAME
from lorica.peft.utils.error import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from lorica.peft.utils.error import PeftError as PeftError
from lorica.peft.utils.loftq_utils import replace_lora_weights_loftq as replace_lora_weights_loftq
from lorica.peft.utils.other import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from lorica.peft.utils.other import ModulesToSaveWrapper as ModulesToSaveWrapper
from lorica.peft.utils.other import TrainableTokensWrapper as TrainableTokensWrapper
from lorica.peft.utils.other import _get_submodules as _get_submodules
from lorica.peft.utils.other import cast_mixed_precision_params as cast_mixed_precision_params
from lorica.peft.utils.other import fsdp_auto_wrap_policy as fsdp_auto_wrap_policy
from lorica.peft.utils.other import get_quantization_config as get_quantization_config
from lorica.peft.utils.other import infer_device as infer_device
from lorica.peft.utils.other import transpose as transpose
from lorica.peft.utils.save_and_load import get_base_model_state_dict as get_base_model_state_dict
from lorica.peft.utils.save_and_load import get_peft_model_state_dict as get_peft_model_state_dict
from lorica.peft.utils.save_and_load import load_peft_weights as load_peft_weights
from lorica.peft.utils.save_and_load import set_base_model_state_dict as set_base_model_state_dict
from lorica.peft.utils.save_and_load import set_peft_model_state_dict as set_peft_model_state_dict
from lorica.peft.utils.warning import PeftWarning as PeftWarning
