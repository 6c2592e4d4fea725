"""From what `from_pretrained` and `load_adapter` are given to an adapter as a value."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lorica.adapter import Adapter
from lorica.checkpoint.peft import (
    as_trained,
    read_scales,
    read_settings,
    read_tensors,
    read_trained_as,
    stacks_of,
)
from lorica.checkpoint.peft_tensors import from_tensors
from lorica.errors import AdapterError, ConfigError, LoricaWarning, listing
from lorica.peft.config import LoraConfig, as_peft_config

_PREFIX = "base_model.model."


def read(
    folder: Path, config: LoraConfig | None = None, key_mapping: Mapping[str, str] | None = None
) -> Adapter:
    """An adapter from a folder, with one of these configurations.

    Args:
        folder: that holds it.
        config: in place of the folder's own.
        key_mapping: regular expression → replacement, for modules that go by another name in this model; the
            first that matches a key is applied.

    Raises:
        FileError: a file is missing or damaged.
        ConfigError: the configuration asks for what lorica does not carry.
        AdapterError: the tensors are not what the configuration says.
    """
    settings = read_settings(folder)
    found = as_trained(read_tensors(folder), settings)
    tensors = renamed(found, key_mapping or {})
    # How it trains is told by the names that modules had then, and goes with the configuration of then.
    told = read_trained_as(folder) if config is None and tensors.keys() == found.keys() else None
    try:
        chosen = LoraConfig.from_dict(settings) if config is None else config
        adapter = from_tensors(tensors, chosen, read_scales(folder))
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    adapter.check_finite()
    trained_as = None if told is None else as_peft_config(told)
    return dataclasses.replace(adapter, trained_as=trained_as, stacks=stacks_of(adapter, settings))


def renamed(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors with each key changed by the first expression that matches it.

    Raises:
        ConfigError: an expression or a replacement is none, or two keys become one.
    """
    result: dict[str, Tensor] = {}
    try:
        patterns = [(re.compile(pattern), new) for pattern, new in key_mapping.items()]
        for key, tensor in tensors.items():
            name = key.removeprefix(_PREFIX)
            changes = (pattern.subn(new, name) for pattern, new in patterns)
            name = next((changed for changed, times in changes if times), name)
            name = _PREFIX + name if key.startswith(_PREFIX) else name
            if name in result:
                raise ConfigError(f"key_mapping makes one key of two: {key} becomes {name}, as another did")
            result[name] = tensor
    except (re.error, TypeError) as error:
        raise ConfigError(f"key_mapping holds no regular expression or replacement: {error}") from error
    return result


def as_trainable(adapter: Adapter, trainable: bool) -> Adapter:
    """The adapter with a configuration that says whether it trains."""
    told = adapter.trained_as
    return dataclasses.replace(
        adapter,
        config=adapter.config.replace(inference_mode=not trainable),
        trained_as=None if told is None else told.replace(inference_mode=not trainable),
    )


def conversions(model: nn.Module, given: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """How keys are to be renamed: as given, or as transformers renamed the architecture's modules."""
    return getattr(model, "_checkpoint_conversion_mapping", None) if given is None else given


def fitting(adapter: Adapter, own: Mapping[str, Tensor]) -> Adapter:
    """The adapter with the model's own tensors where those it trained whole have another shape.

    Args:
        adapter: as it was saved.
        own: the model's tensors by name.

    Warns:
        LoricaWarning: naming what is left out.
    """
    wrong = [n for n, tensor in adapter.extras.items() if n in own and own[n].shape != tensor.shape]
    if wrong:
        warnings.warn(
            f"of another shape than in this model, and so left as the model has it: {listing(wrong)}",
            LoricaWarning,
            stacklevel=3,
        )
    kept = {**adapter.extras, **{name: own[name].detach() for name in wrong}}
    return dataclasses.replace(adapter, extras=kept)
