"""Names of `peft.tuners.lora` that scripts import."""

from __future__ import annotations

from lorica.peft.tuners.lora.bnb import Linear4bit as Linear4bit
from lorica.peft.tuners.lora.bnb import Linear8bitLt as Linear8bitLt
from lorica.peft.tuners.lora.config import CordaConfig as CordaConfig
from lorica.peft.tuners.lora.config import EvaConfig as EvaConfig
from lorica.peft.tuners.lora.config import LoftQConfig as LoftQConfig
from lorica.peft.tuners.lora.config import LoraConfig as LoraConfig
from lorica.peft.tuners.lora.config import LoraGAConfig as LoraGAConfig
from lorica.peft.tuners.lora.config import LoraRuntimeConfig as LoraRuntimeConfig
from lorica.peft.tuners.lora.eva import get_eva_state_dict as get_eva_state_dict
from lorica.peft.tuners.lora.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
from lorica.peft.tuners.lora.layer import Conv1d as Conv1d
from lorica.peft.tuners.lora.layer import Conv2d as Conv2d
from lorica.peft.tuners.lora.layer import Conv3d as Conv3d
from lorica.peft.tuners.lora.layer import Embedding as Embedding
from lorica.peft.tuners.lora.layer import Linear as Linear
from lorica.peft.tuners.lora.layer import LoraLayer as LoraLayer
from lorica.peft.tuners.lora.layer import MultiheadAttention as MultiheadAttention
from lorica.peft.tuners.lora.layer import ParamWrapper as ParamWrapper
from lorica.peft.tuners.lora.loraga import preprocess_loraga as preprocess_loraga
from lorica.peft.tuners.lora.model import LoraModel as LoraModel
