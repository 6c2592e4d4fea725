"""What `peft.utils` exports and scripts import from there."""

from __future__ import annotations

from lorica.model import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from lorica.peft.config import PeftType as PeftType
from lorica.peft.config import TaskType as TaskType
from lorica.peft.utils.save_and_load import get_peft_model_state_dict as get_peft_model_state_dict
from lorica.peft.utils.save_and_load import load_peft_weights as load_peft_weights
from lorica.peft.utils.save_and_load import set_peft_model_state_dict as set_peft_model_state_dict
