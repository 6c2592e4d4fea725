"""What `peft.tuners.tuners_utils` exports and scripts ask isinstance of."""

from __future__ import annotations

import re
from typing import Any

from lorica.layers import LoraLayer as BaseTunerLayer
from lorica.peft.config import LoraConfig
from lorica.peft.tuner import LoraModel as BaseTuner

__all__ = ["BaseTuner", "BaseTunerLayer", "check_target_module_exists"]


def check_target_module_exists(config: LoraConfig, key: str) -> bool:
    """Whether a configuration adapts the module of this path, as far as names tell.

    Args:
        config: its `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern` are asked.
        key: path of the module.
    """
    if _named(config.exclude_modules, key) or not _named(config.target_modules, key):
        return False
    layers = config.layers_to_transform
    if layers is None:
        return True
    pattern = config.layers_pattern
    holders = [pattern] if isinstance(pattern, str) else pattern
    holder = "|".join(map(re.escape, holders)) if holders else r"[^.]+"
    found = re.search(rf"(?:^|\.)(?:{holder})\.(\d+)(?:\.|$)", key)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _named(names: Any, key: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(f".{key}".endswith(f".{name}") for name in names or ())
