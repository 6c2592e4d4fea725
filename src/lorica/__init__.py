"""Low-rank adaptation (LoRA) of pretrained PyTorch models: ``h = W0·x + scale·B·A·x``.

Three nouns: a *config* says what to train, an *adapter* is what training made, and the *adapted model* is
your own model, whose targeted layers changed class in place.

Names are imported when first used, torch with them: the command line answers ``--help`` without either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorica import algebra as algebra
    from lorica import baselines as baselines
    from lorica import study as study
    from lorica.adapter import Adapter as Adapter
    from lorica.adapter import Factors as Factors
    from lorica.baselines import AdapterDConfig as AdapterDConfig
    from lorica.baselines import AdapterHConfig as AdapterHConfig
    from lorica.baselines import AdapterLConfig as AdapterLConfig
    from lorica.baselines import AdapterPConfig as AdapterPConfig
    from lorica.baselines import BitFitConfig as BitFitConfig
    from lorica.baselines import FullConfig as FullConfig
    from lorica.baselines import PreEmbedConfig as PreEmbedConfig
    from lorica.baselines import PreLayerConfig as PreLayerConfig
    from lorica.baselines import TopConfig as TopConfig
    from lorica.checkpoint import is_adapter as is_adapter
    from lorica.checkpoint import read as read
    from lorica.checkpoint import write as write
    from lorica.config import AdapterConfig as AdapterConfig
    from lorica.config import CordaConfig as CordaConfig
    from lorica.config import EvaConfig as EvaConfig
    from lorica.config import LoftQConfig as LoftQConfig
    from lorica.config import LoraConfig as LoraConfig
    from lorica.config import LoraGAConfig as LoraGAConfig
    from lorica.config import MethodConfig as MethodConfig
    from lorica.errors import LoricaError as LoricaError
    from lorica.model import MergeReport as MergeReport
    from lorica.model import ParameterCount as ParameterCount
    from lorica.model import active as active
    from lorica.model import adapt as adapt
    from lorica.model import adapters as adapters
    from lorica.model import attach as attach
    from lorica.model import count as count
    from lorica.model import detach as detach
    from lorica.model import disabled as disabled
    from lorica.model import extract as extract
    from lorica.model import get_eva_state_dict as get_eva_state_dict
    from lorica.model import initialize_lora_eva_weights as initialize_lora_eva_weights
    from lorica.model import load as load
    from lorica.model import load_weights as load_weights
    from lorica.model import merge as merge
    from lorica.model import mixed as mixed
    from lorica.model import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from lorica.model import preprocess_corda as preprocess_corda
    from lorica.model import preprocess_loraga as preprocess_loraga
    from lorica.model import push_to_hub as push_to_hub
    from lorica.model import restore as restore
    from lorica.model import save as save
    from lorica.model import switch as switch
    from lorica.model import trainable_parameters as trainable_parameters
    from lorica.model.loftq import replace_lora_weights_loftq as replace_lora_weights_loftq
    from lorica.study.planning import plan as plan

__version__ = "0.1.0"

_PLACES = {
    "adapter": (
        "Adapter",
        "Factors",
    ),
    "baselines": (
        "AdapterDConfig",
        "AdapterHConfig",
        "AdapterLConfig",
        "AdapterPConfig",
        "BitFitConfig",
        "FullConfig",
        "PreEmbedConfig",
        "PreLayerConfig",
        "TopConfig",
    ),
    "checkpoint": (
        "is_adapter",
        "read",
        "write",
    ),
    "config": (
        "AdapterConfig",
        "CordaConfig",
        "EvaConfig",
        "LoftQConfig",
        "LoraConfig",
        "LoraGAConfig",
        "MethodConfig",
    ),
    "errors": ("LoricaError",),
    "model": (
        "MergeReport",
        "ParameterCount",
        "active",
        "adapt",
        "adapters",
        "attach",
        "count",
        "detach",
        "disabled",
        "extract",
        "get_eva_state_dict",
        "initialize_lora_eva_weights",
        "load",
        "load_weights",
        "merge",
        "mixed",
        "prepare_model_for_kbit_training",
        "preprocess_corda",
        "preprocess_loraga",
        "push_to_hub",
        "restore",
        "save",
        "switch",
        "trainable_parameters",
    ),
    "model.loftq": ("replace_lora_weights_loftq",),
    "study.planning": ("plan",),
}

_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}
_MODULES = frozenset(
    (
        "adapter",
        "algebra",
        "baselines",
        "checkpoint",
        "config",
        "errors",
        "folding",
        "functional",
        "init",
        "layers",
        "model",
        "state",
        "study",
    )
)

__all__ = sorted([*_PLACE_OF, "algebra", "baselines", "study"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PLACE_OF:
        found = getattr(importlib.import_module(f"{__name__}.{_PLACE_OF[name]}"), name)
    elif name in _MODULES:
        found = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACE_OF, *_MODULES})
