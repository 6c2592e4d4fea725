"""TRL's `peft_config`: whose configurations its trainers take, and who puts them on a model.

Each of them asks `isinstance(peft_config, PeftConfig)` and calls `get_peft_model(model, peft_config)`, both
by a name in its own module. The two names are exchanged there for ones that know more:

    a configuration of a class that was taken  ──▶ whoever puts that class on a model
    one of PEFT's                              ──▶ PEFT, unless the model carries adapters of lorica's already
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from lorica.errors import StateError
from lorica.state import find_adapted

_CLASS, _PUT = "PeftConfig", "get_peft_model"

_TAKEN: dict[type, Callable[..., nn.Module]] = {}
"""Class → what puts a configuration of it on a model."""


class _Either(type):
    """A class of PEFT's of whose kind those that were taken count as well."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, (*_TAKEN, cls.__base__ or object))


def take(kind: type, put: Callable[..., nn.Module]) -> None:
    """Have those of TRL's trainers that are loaded take configurations of a class, beside PEFT's.

    Args:
        kind: the class. Of several that a configuration belongs to, the nearest counts.
        put: puts one on a model, and returns what the trainer trains; called as PEFT's `get_peft_model`.
    """
    _TAKEN[kind] = put
    exchange()


def exchange() -> None:
    """Exchange the two names in those of TRL's modules that are loaded and were not seen yet."""
    for module in [vars(module) for name, module in sys.modules.items() if name.startswith("trl.")]:
        configs, theirs = module.get(_CLASS), module.get(_PUT)
        if configs is not None and theirs is not None and not isinstance(configs, _Either):
            module.update({_CLASS: _Either(_CLASS, (configs,), {}), _PUT: _knowing(theirs)})


def _knowing(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def get_peft_model(model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        put = next((_TAKEN[kind] for kind in type(peft_config).__mro__ if kind in _TAKEN), None)
        if put is not None:
            return put(model, peft_config, *args, **kwargs)
        if (found := find_adapted(model)) is not None:
            raise StateError(
                f"the model carries lorica's adapters {', '.join(map(repr, found[1].configs))} already, and "
                "peft_config would put PEFT's layers around them, which freezes them; leave out peft_config: "
                "the trainer trains what the model carries"
            )
        return theirs(model, peft_config, *args, **kwargs)

    return get_peft_model
