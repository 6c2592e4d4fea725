"""What to train: the configuration, in PEFT's own field names and JSON."""

from __future__ import annotations

from lorica.config.checks import BIASES as BIASES
from lorica.config.checks import TASK_TYPES as TASK_TYPES
from lorica.config.inits import INITS as INITS
from lorica.config.inits import CordaConfig as CordaConfig
from lorica.config.inits import EvaConfig as EvaConfig
from lorica.config.inits import LoftQConfig as LoftQConfig
from lorica.config.inits import LoraGAConfig as LoraGAConfig
from lorica.config.inits import changes_base as changes_base
from lorica.config.lora import LoraConfig as LoraConfig
from lorica.config.method import AdapterConfig as AdapterConfig
from lorica.config.method import MethodConfig as MethodConfig
from lorica.config.method import as_config as as_config
from lorica.config.method import family_of as family_of
from lorica.config.method import method_of as method_of
from lorica.config.method import read_config as read_config
from lorica.config.patterns import exactly as exactly
from lorica.config.patterns import full_match as full_match
from lorica.config.patterns import matches_pattern as matches_pattern
from lorica.config.plugins import bounded as bounded
from lorica.config.plugins import foreign as foreign
