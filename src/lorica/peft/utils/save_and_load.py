"""An adapter as a dictionary of tensors, under the keys of PEFT's files."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorica.checkpoint.hub import locate
from lorica.checkpoint.peft import CONFIG_FILE, as_trained, read_settings, read_tensors
from lorica.checkpoint.peft_tensors import to_tensors
from lorica.errors import AdapterError, lines
from lorica.model import values
from lorica.model.structure import adapted
from lorica.peft import loading, places, saving
from lorica.peft.incoming import LoadResult
from lorica.peft.peft_model import PeftModel

_PREFIX = "base_model.model."


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors by their names in PEFT's file.

    They share memory with the model, but for A and B where the start was taken out of W0 (PiSSA, OLoRA,
    CorDA, LoRA-GA): there they are of twice the rank, an update of W0 itself, as in the file.

    Args:
        model: wrapped or not; without the wrapper the keys lack ``base_model.model.``.
        state_dict: take the values from here, by their live names.
        adapter_name: of the adapter.
        unwrap_compiled: accepted; compiled models are looked into always.
        save_embedding_layers: as of `PeftModel.save_pretrained`.

    Raises:
        AdapterError: no such adapter.
    """
    tensors = to_tensors(saving.outgoing(model, adapter_name, state_dict, save_embedding_layers))
    if any(isinstance(module, PeftModel) for module in model.modules()):
        return tensors
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Give an adapter that is on the model other values; nothing else changes.

    Args:
        model: wrapped or not.
        peft_model_state_dict: values by their names in PEFT's file, with ``base_model.model.`` or without.
            Where the start was taken out of W0, either what `get_peft_model_state_dict` gives, or A and B as
            they train, which is what PEFT's gives.
        adapter_name: of the adapter.
        ignore_mismatched_sizes: leave out what has another shape, in place of an error.
        low_cpu_mem_usage: accepted; the values are copied in place.

    Returns:
        Keys of the adapter for which there is no value, and keys that are not the adapter's.

    Raises:
        AdapterError: no such adapter, or the whole list of what has another shape; the model is untouched.
        StateError: the adapter's start was taken out of W0, and is merged.
    """
    given = {_PREFIX + key.removeprefix(_PREFIX): tensor for key, tensor in peft_model_state_dict.items()}
    adapter = saving.outgoing(model, adapter_name, None, False)
    live = to_tensors(adapter)
    if adapter.trained_as is not None:
        root, roster = adapted(model)
        roster.check_unmerged("give the adapter another start")
        training = values.as_trained(root, adapter_name)
        as_it_trains = not _misfits(given, to_tensors(training))
        adapter = training if as_it_trains else copy.deepcopy(adapter)  # of which A and B are copies anyway
        live = to_tensors(adapter)
    wrong = _misfits(given, live)
    if wrong and not ignore_mismatched_sizes:
        raise AdapterError(f"the values do not fit the adapter {adapter_name!r}:\n{lines(wrong)}")
    with torch.no_grad():
        for key, tensor in live.items():
            if key in given and given[key].shape == tensor.shape:
                tensor.copy_(given[key])
    if adapter.trained_as is not None:
        values.overwrite(model, adapter, adapter_name)
    missing = [key for key in live if key not in given]
    return LoadResult(missing, [key for key in given if key not in live])


def _misfits(given: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the shapes of values, for a message."""
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

    What PEFT saved of an nn.MultiheadAttention's output projection is doubled, for it acted twice there.

    Args:
        model_id: folder, or name on the Hub.
        device: to put them on; None leaves them on the CPU.
        key_mapping: regular expression → replacement, for keys of modules renamed since.
        hf_hub_download_kwargs: ``subfolder``, ``revision``, ``token``, ...

    Raises:
        FileError: a file is missing or damaged.
    """
    hub, rest = places.split_hub(hf_hub_download_kwargs)
    places.check_options(rest)
    folder = locate(model_id, **hub)
    # PEFT reads weights that stand there alone.
    settings = read_settings(folder) if (folder / CONFIG_FILE).is_file() else {}
    tensors = loading.renamed(as_trained(read_tensors(folder), settings), key_mapping or {})
    return {key: tensor.to(device or "cpu") for key, tensor in tensors.items()}
