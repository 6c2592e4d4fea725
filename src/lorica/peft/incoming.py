"""What `PeftModel` does with adapters that come and go: new ones, saved ones, and ones that leave."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

import lorica
from lorica.checkpoint.hub import locate
from lorica.config import LoraConfig as CoreConfig
from lorica.model.attach import attach_finite
from lorica.model.values import overwrite
from lorica.peft import loading, places
from lorica.peft.base import match_base_dtype
from lorica.peft.checks import warn_of_name
from lorica.peft.config import as_peft_config
from lorica.peft.tuner import LoraModel


class LoadResult(NamedTuple):
    """What did not fit, as torch's `load_state_dict` tells it.

    Args:
        missing_keys: of the model, without a value.
        unexpected_keys: without a place.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Incoming(nn.Module):
    """The part of `PeftModel` that takes adapters in and lets them go."""

    base_model: LoraModel

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: CoreConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter, neither acting nor training yet: `set_adapter` has it do both.

        Args:
            adapter_name: of the adapter.
            peft_config: what to train.
            low_cpu_mem_usage: accepted; nothing is ever initialised twice here.
            autocast_adapter_dtype: as for the class.

        Raises:
            AdapterError: the name is taken or cannot be one.
            TargetError: a pattern matches nothing, or something that cannot be adapted.
        """
        warn_of_name(adapter_name)
        self.base_model.inject_adapter(as_peft_config(peft_config), adapter_name, low_cpu_mem_usage)
        if not autocast_adapter_dtype:
            match_base_dtype(self.base_model.model, adapter_name)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Add a saved adapter, not acting yet; one that is there already takes the saved values.

        Args:
            model_id: folder, or name on the Hub.
            adapter_name: to give it.
            is_trainable: whether it trains further. If not, the model goes into evaluation mode.
            torch_device: accepted; the adapter goes where its base is.
            autocast_adapter_dtype: as for the class.
            ephemeral_gpu_offload: accepted, and needless.
            low_cpu_mem_usage: accepted; nothing is ever initialised only to be overwritten.
            key_mapping: regular expression → replacement, for keys of modules renamed since.
            kwargs: ``subfolder``, ``revision``, ``token`` and whatever else downloads take.

        Returns:
            Two empty lists: what does not fit is an error.

        Raises:
            FileError: a file is missing or damaged.
            ConfigError: the configuration asks for what lorica does not carry.
            AdapterError: with the whole list of what does not fit; the model is untouched.

        Warns:
            LoricaWarning: one that is there has another scale, tokens or start than the saved values.
        """
        found, options = places.split_hub(kwargs)
        places.check_options(options)
        folder = locate(model_id, **found)
        model, before = self.base_model.model, self.base_model.adapter_state.active
        there = adapter_name in self.base_model.peft_config
        adapter = loading.read(folder, key_mapping=loading.conversions(model, key_mapping))
        if options.get("ignore_mismatched_sizes"):
            live = lorica.extract(model, adapter_name).extras if there else None
            adapter = loading.fitting(adapter, live or model.state_dict())
        if there:
            # PEFT takes the values alone, whatever the settings that are there make of them.
            overwrite(model, adapter, adapter_name, strict=False)
        else:
            attach_finite(
                model, loading.as_trainable(adapter, is_trainable), adapter_name, trainable=is_trainable
            )
            if self.base_model._resting is not None:
                lorica.active(model, before)
        if not autocast_adapter_dtype:
            match_base_dtype(model, adapter_name)
        if not is_trainable:
            self.eval()
        return LoadResult([], [])

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; if it acted alone, the first that is left acts.

        Raises:
            AdapterError: no such adapter.
            StateError: it is merged.
        """
        self.base_model.delete_adapter(adapter_name)
