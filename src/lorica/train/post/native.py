"""TRL's own trainers, in a script of one's own: `peft_config` may be a configuration of lorica's."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import Any

from torch import nn

from lorica.config import LoraConfig, MethodConfig
from lorica.errors import require
from lorica.model import adapt
from lorica.model.pretrained import configurations


def teach_trl() -> None:
    """Have TRL's trainers take lorica's configurations as `peft_config`; the model is adapted in place.

    That is `lorica.adapt(model, config)` where the trainer would have PEFT wrap the model. Without it, adapt
    the model first and leave `peft_config` out.

    Raises:
        MissingExtra: TRL is not installed, or PEFT, which TRL asks for before it looks at `peft_config`.
    """
    trl: Any = require("trl", extra="post")
    if importlib.util.find_spec("peft") is None:
        require("peft", extra="peers")
    trainers = importlib.import_module(f"{trl.__name__}.trainer")
    for found in pkgutil.iter_modules(trainers.__path__):
        if found.name.endswith("_trainer"):
            importlib.import_module(f"{trainers.__name__}.{found.name}")
    for kind in (LoraConfig, MethodConfig):
        configurations.take(kind, _put)


def _put(model: nn.Module, config: Any, *args: Any, **options: Any) -> nn.Module:
    return adapt(model, config)
