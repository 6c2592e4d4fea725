"""Names of `peft.tuners` that scripts import."""

from __future__ import annotations

from lorica.peft.tuners import lora as lora
from lorica.peft.tuners import tuners_utils as tuners_utils
from lorica.peft.tuners.lora import LoraConfig as LoraConfig
from lorica.peft.tuners.lora import LoraModel as LoraModel
from lorica.peft.tuners.lora import LoraRuntimeConfig as LoraRuntimeConfig
from lorica.peft.tuners.tuners_utils import BaseTuner as BaseTuner
from lorica.peft.tuners.tuners_utils import BaseTunerLayer as BaseTunerLayer
