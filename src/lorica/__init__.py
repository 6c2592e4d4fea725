"""Low-rank adaptation (LoRA) of pretrained PyTorch models: ``h = W0·x + scale·B·A·x``.

Three nouns: a *config* says what to train, an *adapter* is what training made, and the *adapted model* is
your own model, whose targeted layers changed class in place.

Names are imported when first used, torch with them: the command line answers ``--help`` without either.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - grouped by what one does
    # what to train: LoRA, its starts, and the paper's other methods
    "LoraConfig",
    "EvaConfig",
    "CordaConfig",
    "LoraGAConfig",
    "LoftQConfig",
    "AdapterDConfig",
    "AdapterHConfig",
    "AdapterLConfig",
    "AdapterPConfig",
    "BitFitConfig",
    "FullConfig",
    "PreEmbedConfig",
    "PreLayerConfig",
    "TopConfig",
    "AdapterConfig",
    "MethodConfig",
    # before anything is trained: what a config would do, and cost
    "preview",
    "count",
    "plan",
    # adapters on a model: on, off, and which of them act
    "adapt",
    "adapters",
    "active",
    "disabled",
    "mixed",
    "detach",
    "trainable_parameters",
    # in the weights, and out again
    "merge",
    "switch",
    "restore",
    "finalize",
    "delta_weight",
    # files
    "save",
    "load",
    "load_weights",
    "push_to_hub",
    "read",
    "write",
    "is_adapter",
    # adapters as values
    "Adapter",
    "Factors",
    "extract",
    "attach",
    "algebra",
    "study",
    # what functions return, and raise
    "MergeReport",
    "ParameterCount",
    "Preview",
    "LoricaError",
    "methods",
]

if TYPE_CHECKING:
    from lorica import algebra, methods, study
    from lorica.adapter import Adapter, Factors
    from lorica.checkpoint import is_adapter, read, write
    from lorica.config import (
        AdapterConfig,
        CordaConfig,
        EvaConfig,
        LoftQConfig,
        LoraConfig,
        LoraGAConfig,
        MethodConfig,
    )
    from lorica.errors import LoricaError
    from lorica.methods import (
        AdapterDConfig,
        AdapterHConfig,
        AdapterLConfig,
        AdapterPConfig,
        BitFitConfig,
        FullConfig,
        PreEmbedConfig,
        PreLayerConfig,
        TopConfig,
    )
    from lorica.model import (
        MergeReport,
        ParameterCount,
        active,
        adapt,
        adapters,
        attach,
        delta_weight,
        detach,
        disabled,
        extract,
        finalize,
        load,
        load_weights,
        merge,
        mixed,
        push_to_hub,
        restore,
        save,
        switch,
        trainable_parameters,
    )
    from lorica.study.planning import Preview, count, plan, preview

# Module → the names that are imported from it when they are first used.
_PLACES = {
    "adapter": "Adapter Factors",
    "methods": "AdapterDConfig AdapterHConfig AdapterLConfig AdapterPConfig BitFitConfig FullConfig "
    "PreEmbedConfig PreLayerConfig TopConfig",
    "checkpoint": "is_adapter read write",
    "config": "AdapterConfig CordaConfig EvaConfig LoftQConfig LoraConfig LoraGAConfig MethodConfig",
    "errors": "LoricaError",
    "model": "MergeReport ParameterCount active adapt adapters attach delta_weight detach disabled extract "
    "finalize load load_weights merge mixed push_to_hub restore save switch trainable_parameters",
    "study.planning": "Preview count plan preview",
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names.split()}


def names_of(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: each name is imported from its module when it is first used.

    Args:
        package: dotted name of the package.
        places: module in the package → its names, with spaces between them.
    """
    place_of = {name: place for place, names in places.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in place_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{package}.{place_of[name]}"), name)
        setattr(importlib.import_module(package), name, found)
        return found

    return get


_MODULES = {
    *("adapter", "algebra", "methods", "checkpoint", "config", "errors", "folding"),
    *("functional", "inits", "layers", "model", "parallel", "pieces", "state", "study"),
}


# PEFT's functions, which stood here once.
_PEFTS = {
    *("get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_corda", "preprocess_loraga"),
    *("prepare_model_for_kbit_training", "replace_lora_weights_loftq"),
}


def __getattr__(name: str) -> Any:
    if name in _PLACE_OF:
        found = getattr(importlib.import_module(f"{__name__}.{_PLACE_OF[name]}"), name)
    elif name in _MODULES:
        found = importlib.import_module(f"{__name__}.{name}")
    elif name == "baselines":
        raise AttributeError(f"{__name__}.baselines is {__name__}.methods now")
    elif name in _PEFTS:
        instead = (
            ", or give lorica.adapt the data (data=...)" if "loftq" not in name and "kbit" not in name else ""
        )
        raise AttributeError(f"{__name__}.{name} is {__name__}.peft.{name} now{instead}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACE_OF, *_MODULES})
