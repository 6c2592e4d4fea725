"""An adapter as a dictionary of tensors, under the keys of PEFT's files."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

import lorica
from lorica.adapter import Adapter
from lorica.checkpoint.hub import locate
from lorica.checkpoint.peft import (
    CONFIG_FILE,
    as_trained,
    read_marks,
    read_scales,
    read_settings,
    read_tensors,
    read_trained_as,
    stacks_of,
)
from lorica.checkpoint.peft_tensors import from_tensors, to_tensors
from lorica.config import LoraConfig as CoreConfig
from lorica.errors import AdapterError, ConfigError, StateError, lines, listing
from lorica.layers import SwappedModule
from lorica.model import files
from lorica.model.merging.merged import as_unmerged, behind_merge
from lorica.model.pretrained.vocabulary import is_resized, with_tables
from lorica.peft.config import LoraConfig, as_peft_config, check_options, split_hub
from lorica.peft.utils.integrations import from_meta, on_meta, to_meta
from lorica.pieces.copies import ParameterCopy
from lorica.state import AdapterState, adapted
from lorica.tree import as_uncompiled, base_parameters, walk

_PREFIX = "base_model.model."
# Parts that wrapping and data parallelism add to a name.
_WRAPPERS = re.compile(r"^(?:module\.)*base_model\.model\.")


class LoadResult(NamedTuple):
    """The keys that did not fit, as torch's `load_state_dict` returns them.

    Args:
        missing_keys: the model's keys without a value.
        unexpected_keys: the given keys without a place.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


def read(
    folder: Path, config: LoraConfig | None = None, key_mapping: Mapping[str, str] | None = None
) -> Adapter:
    """An adapter from a folder, with one of these configurations.

    Args:
        folder: the adapter's folder.
        config: replaces the folder's own.
        key_mapping: regular expression → replacement, for modules with another name in this model; the first
            that matches a key is applied.

    Raises:
        FileError: a file is missing or damaged.
        ConfigError: the configuration asks for a feature that lorica does not have.
        AdapterError: the tensors do not fit the configuration.
    """
    settings = read_settings(folder)
    found = as_trained(read_tensors(folder), settings)
    tensors = renamed(found, key_mapping or {})
    # `trained_as` uses the modules' old names, and belongs to the saved configuration.
    told = read_trained_as(folder) if config is None and tensors.keys() == found.keys() else None
    try:
        chosen = LoraConfig.from_dict(settings) if config is None else config
        adapter = from_tensors(tensors, chosen, read_scales(folder), read_marks(folder))
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    adapter.check_finite()
    trained_as = None if told is None else as_peft_config(told)
    return dataclasses.replace(adapter, trained_as=trained_as, stacks=stacks_of(adapter, settings))


def renamed(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors with each key changed by the first expression that matches it.

    Raises:
        ConfigError: an expression or a replacement is not valid, or two keys become one.
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


def conversions(model: nn.Module, given: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """The renaming of keys: as given, or as transformers renamed the architecture's modules."""
    return getattr(model, "_checkpoint_conversion_mapping", None) if given is None else given


def outgoing(
    model: nn.Module,
    name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: str | bool = "auto",
) -> Adapter:
    """An adapter as it is saved; also while it is merged.

    Args:
        model: wrapped or not.
        name: of the adapter.
        state_dict: take the values from here, by their live names.
        save_embedding_layers: whether to add the embedding tables of the base: True, False, or "auto": if
            their number of rows differs from the base's own configuration.

    Raises:
        AdapterError: no such adapter; or `state_dict` lacks a tensor that trains, or holds it in another
            shape.
        ConfigError: `save_embedding_layers` has another value.
    """
    root, _ = adapted(model)
    gathered = None if state_dict is None else _Gathered(state_dict)
    with behind_merge(root):
        adapter = lorica.extract(root, name, state_dict=gathered)
        if gathered is not None:
            gathered.check(name, root)
    if save_embedding_layers not in (True, False, "auto"):
        raise ConfigError(f'save_embedding_layers is True, False or "auto", not {save_embedding_layers!r}')
    if save_embedding_layers is True or (save_embedding_layers == "auto" and is_resized(root)):
        adapter = with_tables(adapter, root)
    return dataclasses.replace(adapter, config=_telling_base(adapter.lora, root))


class _Gathered(dict[str, Tensor]):
    """Values by their live names, as sharded training gathers them; records the names that are read."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        super().__init__({_WRAPPERS.sub("", as_uncompiled(key)): value for key, value in state_dict.items()})
        self._live: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """True: an empty one is read too."""
        return True

    def get(self, key: str, default: Any = None) -> Any:
        """The value of that name, or else the live one."""
        self._live[key] = default
        return super().get(key, default)

    def check(self, adapter: str, root: nn.Module) -> None:
        """Refuse values that are not the adapter's.

        Frozen values may be missing: DeepSpeed leaves them out. A shard is flat or empty, so its
        shape is not compared.

        Raises:
            AdapterError: with the whole list.
        """
        live = (as_uncompiled(name) for name, _ in root.named_parameters())
        of_model = not self.keys().isdisjoint(live)
        problems = [
            f"missing: {key}"
            for key, live in self._live.items()
            if key not in self and (live.requires_grad or not of_model)
        ]
        problems += [
            f"shape of {key}: {tuple(self[key].shape)}, on the model {tuple(live.shape)}"
            for key, live in self._live.items()
            if key in self and live.dim() > 1 and live.numel() and self[key].shape != live.shape
        ]
        if problems:
            raise AdapterError(
                f"state_dict should hold the values of the adapter {adapter!r} by their names in "
                f"model.state_dict(), and has {listing(list(self)[:3]) or 'nothing'}, ...:\n{lines(problems)}"
            )


def _telling_base(config: CoreConfig, root: nn.Module) -> CoreConfig:
    """The configuration with the base's class in it, if no task says how to load the base."""
    if config.task_type is None and getattr(config, "auto_mapping", ()) is None:
        mapping = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
        return config.replace(auto_mapping=mapping)
    return config


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors by their names in PEFT's file.

    They share memory with the model, except A and B of a start that was taken out of W0 (PiSSA, OLoRA, CorDA,
    LoRA-GA): these have twice the rank and are an update of W0 itself, as in the file.

    Args:
        model: wrapped or not; without the wrapper the keys lack ``base_model.model.``.
        state_dict: take the values from here, by their live names.
        adapter_name: of the adapter.
        unwrap_compiled: accepted without effect: compiled models are always unwrapped.
        save_embedding_layers: as of `PeftModel.save_pretrained`.

    Raises:
        AdapterError: no such adapter.
    """
    tensors = to_tensors(outgoing(model, adapter_name, state_dict, save_embedding_layers))
    if any(_is_wrapper(module) for module in model.modules()):
        return tensors
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


def _is_wrapper(module: nn.Module) -> bool:
    """Whether this is a `PeftModel`, whose parameters' names begin with ``base_model.model.``."""
    return hasattr(module._modules.get("base_model"), "tuner_layer_cls")


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Give an adapter on the model other values; nothing else changes.

    Args:
        model: wrapped or not.
        peft_model_state_dict: values by their names in PEFT's file, with ``base_model.model.`` or without.
            For a start that was taken out of W0, either the result of `get_peft_model_state_dict`, or A and B
            as they train, which PEFT's function of that name returns.
        adapter_name: name of the adapter.
        ignore_mismatched_sizes: leave out tensors of another shape instead of raising.
        low_cpu_mem_usage: accepted without effect: an adapter on the meta device is allocated.

    Returns:
        Keys of the adapter without a value, and keys that are not the adapter's.

    Raises:
        AdapterError: no such adapter, or lists all tensors of another shape; the model is untouched.
        StateError: the adapter's start was taken out of W0, and is merged.
    """
    root = adapted(model)[0]
    without_values = on_meta(root, adapter_name)
    if without_values:
        from_meta(root, adapter_name)
    given = {_PREFIX + key.removeprefix(_PREFIX): tensor for key, tensor in peft_model_state_dict.items()}
    adapter = outgoing(model, adapter_name, None, False)
    live = to_tensors(adapter)
    if adapter.trained_as is not None:
        root, state = adapted(model)
        state.check_unmerged("give the adapter another start")
        training = files.extract_live(root, adapter_name)
        as_it_trains = not _misfits(given, to_tensors(training))
        adapter = training if as_it_trains else copy.deepcopy(adapter)  # of which A and B are copies anyway
        live = to_tensors(adapter)
    missing = [key for key in live if key not in given]
    if without_values and missing:
        to_meta(root, adapter_name)
        raise AdapterError(
            f"the adapter {adapter_name!r} is on the meta device (low_cpu_mem_usage), so it needs all of its "
            f"values; missing:\n{lines(missing)}"
        )
    wrong = _misfits(given, live)
    if wrong and not ignore_mismatched_sizes:
        raise AdapterError(f"the values do not fit the adapter {adapter_name!r}:\n{lines(wrong)}")
    with torch.no_grad():
        for key, tensor in live.items():
            if key in given and given[key].shape == tensor.shape:
                tensor.copy_(given[key])
    if adapter.trained_as is not None:
        files.overwrite(model, adapter, adapter_name)
    placed = _bring(root, adapter_name, {key: t for key, t in given.items() if key not in live})
    return LoadResult(missing, [key for key in given if key not in live and key not in placed])


def _bring(root: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> set[str]:
    """Let an adapter bring values of the base's own parameters that it does not train: biases, as a rule.

    They act while it does, and W0 stays; PEFT writes them into the base.

    Args:
        root: the model.
        name: of the adapter.
        tensors: by their names in PEFT's file.

    Returns:
        Keys of the tensors that are such parameters.
    """
    state = adapted(root)[1]
    state.check_unmerged("give an adapter parameters of the base")
    have = base_parameters(root)
    named = {key: key.removeprefix(_PREFIX).replace(".base_layer.", ".") for key in tensors}
    found = {
        key: path for key, path in named.items() if path in have and have[path].shape == tensors[key].shape
    }
    acting = state.active
    state.activate(root, ())
    for key, path in found.items():
        base = state.base_parameter(root, path)
        value = tensors[key].to(base, copy=True)
        if not torch.equal(value, base):
            state.add(root, name, ParameterCopy(path, Parameter(value)), trainable=False)
    state.activate(root, acting)
    return set(found)


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors by their names in it, even while an adapter replaces them.

    Args:
        model: wrapped or not.
    """
    root, state = adapted(model)
    with _base(root, state):
        own = [
            f"{place.path}.{name}." if place.path else f"{name}."
            for place in walk(root)
            if isinstance(place.module, SwappedModule)
            for name in place.module.own_modules
        ]
        return {key: tensor for key, tensor in root.state_dict().items() if not key.startswith(tuple(own))}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Give the base other values; its adapters stay.

    Args:
        model: wrapped or not.
        state_dict: values by the base's own names.
        strict: refuse keys that are missing or unexpected.

    Returns:
        Keys of the base without a value, and keys that are not the base's.

    Raises:
        StateError: lists the tensors that do not fit; or a start was taken out of the base, or an adapter is
            merged into it. The model is untouched.
    """
    root, state = adapted(model)
    state.check_unmerged("load another base")
    begun = [name for name in state.configs if state.starts_in(name)]
    if begun:
        raise StateError(
            f"the start of {listing(map(repr, begun))} was taken out of the base that is there (PiSSA, "
            "OLoRA, CorDA, LoRA-GA, LoftQ), so another base cannot be loaded below it; load the base first"
        )
    live = get_base_model_state_dict(root)
    missing = [key for key in live if key not in state_dict]
    unexpected = [key for key in state_dict if key not in live]
    wrong = [f"shape of {problem}" for problem in _misfits(state_dict, live)]
    if strict and missing:
        wrong.append(f"Missing key(s) in state_dict: {listing(missing)}")
    if strict and unexpected:
        wrong.append(f"Unexpected key(s) in state_dict: {listing(unexpected)}")
    if wrong:
        raise StateError(f"the values do not fit the base:\n{lines(wrong)}")
    with torch.no_grad():
        for key, tensor in live.items():
            if key in state_dict:
                tensor.copy_(state_dict[key])
    return LoadResult(missing, unexpected)


@contextlib.contextmanager
def _base(root: nn.Module, state: AdapterState) -> Iterator[None]:
    """Put the base's own parameters into the model for the length of a block."""
    if not state.merged:
        with state.base_in_place(root):
            yield
        return
    merged, active = state.merged, state.active
    with as_unmerged(root):
        state.activate(root, ())
        try:
            yield
        finally:
            state.activate(root, merged)
            state.active = active


def _misfits(given: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> list[str]:
    """Lists the values of another shape, for a message."""
    return [
        f"{key}: {tuple(given[key].shape)} is given, the model has {tuple(tensor.shape)}"
        for key, tensor in live.items()
        if key in given and given[key].shape != tensor.shape
    ]


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors of a saved adapter by their names in the file.

    PEFT's updates of an nn.MultiheadAttention's output projection are doubled, for PEFT applies them twice.

    Args:
        model_id: folder, or name on the Hub.
        device: device of the tensors; None leaves them on the CPU.
        key_mapping: regular expression → replacement, for keys of modules renamed since.
        hf_hub_download_kwargs: ``subfolder``, ``revision``, ``token``, ...

    Raises:
        FileError: a file is missing or damaged.
    """
    hub, rest = split_hub(hf_hub_download_kwargs)
    check_options(rest)
    folder = locate(model_id, **hub)
    # PEFT reads weights without a configuration beside them.
    settings = read_settings(folder) if (folder / CONFIG_FILE).is_file() else {}
    tensors = renamed(as_trained(read_tensors(folder), settings), key_mapping or {})
    return {key: tensor.to(device or "cpu") for key, tensor in tensors.items()}
