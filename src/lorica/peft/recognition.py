"""Being recognised by libraries that know PEFT's models by their class.

transformers' Trainer, accelerate and TRL ask `isinstance(model, peft.PeftModel)` before they save, resume or
freeze anything. There is nothing else to opt in by, so the model answers yes, as `unittest.mock` does:
`__class__` says so, while `type(model)`, and with it every method, stays lorica's. Without PEFT the question
is never asked; then transformers' own function that would ask is told.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import Any

import torch
from torch import nn

_CLASS = object.__dict__["__class__"]
_ASKS = "_is_peft_model"


@functools.cache
def _joined(own: type, other: type) -> type:
    return type(own.__name__, (own, other), {"__module__": own.__module__, "__doc__": own.__doc__})


def _apparent_class(self: nn.Module) -> type:
    own = type(self)
    if torch.compiler.is_compiling():
        return own
    peft = sys.modules.get("peft")
    if peft is not None and not getattr(peft, "__name__", "").startswith("lorica."):
        theirs = next((vars(peft)[cls.__name__] for cls in own.__mro__ if cls.__name__ in vars(peft)), None)
    else:
        modeling = sys.modules.get("transformers.modeling_utils")
        theirs = getattr(modeling, "PreTrainedModel", None)
    return own if theirs is None else _joined(own, theirs)


def _become(self: nn.Module, cls: type) -> None:
    _CLASS.__set__(self, cls)


apparent_class: Any = property(_apparent_class, _become)


def tell_transformers(known: type[nn.Module]) -> None:
    """Where PEFT is not installed, have transformers' Trainer treat `known` as it treats PEFT's models."""
    if "transformers" not in sys.modules or importlib.util.find_spec("peft") is not None:
        return
    trainer_utils = importlib.import_module("transformers.trainer_utils")
    asks = getattr(trainer_utils, _ASKS, None)
    if asks is None or getattr(asks, "knows_lorica", False):
        return

    @functools.wraps(asks)
    def is_peft_model(model: object) -> bool:
        return isinstance(model, known) or asks(model)

    is_peft_model.knows_lorica = True  # type: ignore[attr-defined]
    for module in [module for name, module in sys.modules.items() if name.startswith("transformers.")]:
        if vars(module).get(_ASKS) is asks:
            setattr(module, _ASKS, is_peft_model)
