"""Starts that look at data, or at the base's files, before an adapter trains.

preprocess   CorDA: the layers' inputs; LoRA-GA: the weights' gradients
eva          the principal directions of the layers' inputs, and ranks where they vary most
loftq        what packing took from a base that is quantized already
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lorica import inits
from lorica.config import AdapterConfig, LoraConfig
from lorica.config.inits import FROM_DATA
from lorica.errors import ConfigError
from lorica.model.starts.eva import get_eva_state_dict as get_eva_state_dict
from lorica.model.starts.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
from lorica.model.starts.eva import with_ranks
from lorica.model.starts.loftq import replace_lora_weights_loftq as replace_lora_weights_loftq
from lorica.model.starts.preprocess import preprocess_corda as preprocess_corda
from lorica.model.starts.preprocess import preprocess_loraga as preprocess_loraga
from lorica.model.starts.preprocess import seen_by_corda, seen_by_loraga
from lorica.state import find_adapted
from lorica.tree import uncompiled

Looked = tuple[LoraConfig, Mapping[str, Any]]


def look(model: nn.Module, config: AdapterConfig, data: Any, seed: int) -> Looked:
    """Show a model the data that a configuration's start looks at.

    Args:
        model: the model, not adapted by this configuration yet.
        config: its `init_lora_weights` says what is looked for.
        data: batches, or what else such a start takes.
        seed: of randomized decompositions.

    Returns:
        The configuration, with the ranks that the data asks for; and what was seen of each module, by path.

    Raises:
        ConfigError: its start looks at no data.
        AdapterError: the data shows nothing of a layer; naming it.
        TargetError: it targets a layer that cannot start so.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError("data= is for starts of LoRA alone that look at some; leave it out")
    value = config.init_lora_weights
    if value in _LOOKS:
        return _LOOKS[value](model, config, data, seed)
    if not inits.of(config).looks:
        raise ConfigError(
            f"data was given, but init_lora_weights={value!r} looks at none; leave data out, or choose one "
            f"of {FROM_DATA}"
        )
    return config, inits.of(config).look(model, config, data, seed)


def _eva(model: nn.Module, config: LoraConfig, data: Any, seed: int) -> Looked:
    found = get_eva_state_dict(model, data, config, seed=seed)
    root, _ = find_adapted(model) or (uncompiled(model), None)
    return with_ranks(root, config, {path: len(A) for path, A in found.items()}), found


_LOOKS: Mapping[bool | str, Callable[[nn.Module, LoraConfig, Any, int], Looked]] = {
    "eva": _eva,
    "corda": lambda model, config, data, _: (config, seen_by_corda(model, config, data)),
    "lora_ga": lambda model, config, data, _: (config, seen_by_loraga(model, config, data)),
}
