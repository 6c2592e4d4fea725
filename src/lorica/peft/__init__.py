"""PEFT's LoRA, name for name, over lorica: ``from peft import ...`` becomes ``from lorica.peft import ...``.

Each file has PEFT's name and the LoRA part of its contents:

config.py          configurations, and the options of loading
mapping_func.py    get_peft_model
mapping.py         inject_adapter_in_model
peft_model/        PeftModel, a class per task, the status of layers
auto.py            a base and its adapter in one call
tuners/            tuners_utils.py: BaseTuner, which manages a model's adapters; lora/: LoraModel, starts
utils/             save_and_load.py, hotswap.py, other.py (names of modules), integrations.py (libraries)
optimizers/        LoRA+ and LoRA-FA
helpers.py  functional.py  import_utils.py

Features that lorica does not have are refused by name. Where PEFT 0.21 differs from its own documentation,
this follows the documentation.
"""

from __future__ import annotations

from lorica.config import CordaConfig as CordaConfig
from lorica.config import EvaConfig as EvaConfig
from lorica.config import LoftQConfig as LoftQConfig
from lorica.config import LoraGAConfig as LoraGAConfig
from lorica.errors import NotCarried
from lorica.peft import functional as functional
from lorica.peft import import_utils as import_utils
from lorica.peft import mapping_func as mapping_func
from lorica.peft import tuners as tuners
from lorica.peft import utils as utils
from lorica.peft.auto import AutoPeftModel as AutoPeftModel
from lorica.peft.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from lorica.peft.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from lorica.peft.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from lorica.peft.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from lorica.peft.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from lorica.peft.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from lorica.peft.config import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
from lorica.peft.config import LoraConfig as LoraConfig
from lorica.peft.config import LoraRuntimeConfig as LoraRuntimeConfig
from lorica.peft.config import PeftConfig as PeftConfig
from lorica.peft.config import PeftType as PeftType
from lorica.peft.config import TaskType as TaskType
from lorica.peft.config import __version__ as __version__
from lorica.peft.config import get_peft_config as get_peft_config
from lorica.peft.helpers import rescale_adapter_scale as rescale_adapter_scale
from lorica.peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING
from lorica.peft.mapping import inject_adapter_in_model as inject_adapter_in_model
from lorica.peft.mapping_func import get_peft_model as get_peft_model
from lorica.peft.optimizers import create_lorafa_optimizer as create_lorafa_optimizer
from lorica.peft.optimizers import create_loraplus_optimizer as create_loraplus_optimizer
from lorica.peft.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from lorica.peft.peft_model import PeftModel as PeftModel
from lorica.peft.peft_model import PeftModelForCausalLM as PeftModelForCausalLM
from lorica.peft.peft_model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from lorica.peft.peft_model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from lorica.peft.peft_model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from lorica.peft.peft_model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from lorica.peft.peft_model import PeftModelForTokenClassification as PeftModelForTokenClassification
from lorica.peft.peft_model import get_layer_status as get_layer_status
from lorica.peft.peft_model import get_model_status as get_model_status
from lorica.peft.tuners.lora.corda import preprocess_corda as preprocess_corda
from lorica.peft.tuners.lora.eva import get_eva_state_dict as get_eva_state_dict
from lorica.peft.tuners.lora.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
from lorica.peft.tuners.lora.loraga import preprocess_loraga as preprocess_loraga
from lorica.peft.tuners.lora.model import LoraModel as LoraModel
from lorica.peft.utils.error import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from lorica.peft.utils.loftq_utils import replace_lora_weights_loftq as replace_lora_weights_loftq
from lorica.peft.utils.other import cast_mixed_precision_params as cast_mixed_precision_params
from lorica.peft.utils.other import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from lorica.peft.utils.save_and_load import get_base_model_state_dict as get_base_model_state_dict
from lorica.peft.utils.save_and_load import get_peft_model_state_dict as get_peft_model_state_dict
from lorica.peft.utils.save_and_load import load_peft_weights as load_peft_weights
from lorica.peft.utils.save_and_load import set_base_model_state_dict as set_base_model_state_dict
from lorica.peft.utils.save_and_load import set_peft_model_state_dict as set_peft_model_state_dict

_METHODS = """
AdaLora Adamss AdaptionPrompt Arrow BdLora Beft BOFT C3A Cartridge CPT Deft DeLora FourierFT Frod Glora
Gralora Hira HRA IA3 Kasa Lily LNTuning LoHa LoKr Mica Miss Monteclora MultitaskPromptTuning OFT OSF Peanut
PeftMixed Poly PrefixTuning PromptEncoder PromptTuning Psoft PVeRA RandLora Road Shadow Shira TinyLora
TrainableTokens UniLora VBLoRA Velora Vera WaveFT XLora
"""
_INSTEAD = {
    "PrefixTuning": "lorica.PrefixConfig, of lorica itself, is the paper's",
    "TrainableTokens": "LoraConfig(trainable_token_indices=...) trains rows beside LoRA",
    "Mica": 'init_lora_weights="pissa" starts from singular vectors too',
}


def __getattr__(name: str) -> object:
    """Refuse PEFT's other methods by name.

    Raises:
        NotCarried: it is one of them.
    """
    for method in _METHODS.split():
        if name in (f"{method}Config", f"{method}Model"):
            instead = _INSTEAD.get(method, "use PEFT itself for it")
            raise NotCarried(f"{name}: lorica.peft carries PEFT's LoRA, not its other methods; {instead}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
