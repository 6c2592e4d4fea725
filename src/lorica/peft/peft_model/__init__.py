"""`PeftModel`, PEFT's wrapper around a model, and the status of a model's adapters.

wrapper.py   the wrapper in memory: its adapters, calls, and the choice of the active ones
model.py     `PeftModel` with files in and out, and a class per task
status.py    the status of each layer's adapters
"""

from __future__ import annotations

from lorica.peft.peft_model.model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from lorica.peft.peft_model.model import PeftModel as PeftModel
from lorica.peft.peft_model.model import PeftModelForCausalLM as PeftModelForCausalLM
from lorica.peft.peft_model.model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from lorica.peft.peft_model.model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from lorica.peft.peft_model.model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from lorica.peft.peft_model.model import (
    PeftModelForSequenceClassification as PeftModelForSequenceClassification,
)
from lorica.peft.peft_model.model import PeftModelForTokenClassification as PeftModelForTokenClassification
from lorica.peft.peft_model.status import TunerLayerStatus as TunerLayerStatus
from lorica.peft.peft_model.status import TunerModelStatus as TunerModelStatus
from lorica.peft.peft_model.status import get_layer_status as get_layer_status
from lorica.peft.peft_model.status import get_model_status as get_model_status
