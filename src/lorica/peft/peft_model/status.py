"""The status of a model's adapters, per layer and for the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn import Parameter

import lorica
from lorica.errors import StateError
from lorica.layers import AskedModule, TrainedTokens
from lorica.model.merging.merged import as_unmerged, behind_merge
from lorica.peft.tuners.lora.layer import module_type, quantization_backend
from lorica.state import AdapterState, find_adapted
from lorica.tree import uncompiled, walk

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """The status of an adapted layer.

    Args:
        name: path of the layer.
        module_type: its kind by PEFT's names: ``"lora.Linear"``.
        enabled: whether adapters are enabled.
        active_adapters: active adapters, also while disabled.
        merged_adapters: merged adapters.
        requires_grad: adapter → whether it trains; ``"irregular"`` if a part of it does.
        available_adapters: all adapters of the layer.
        devices: adapter → kinds of device of its parameters.
        quantization_backend: such as ``"bnb 4bit"``, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The status of a model with adapters; a value is ``"irregular"`` if the layers differ.

    Args:
        base_model_type: class of the base.
        adapter_model_type: ``"LoraModel"``, or ``"None"`` without PEFT's wrapper.
        peft_types: adapter → method.
        trainable_params: number of parameters that train.
        total_params: number of all parameters.
        num_adapter_layers: number of adapted layers.
        enabled: whether adapters are enabled.
        active_adapters: active adapters, also while disabled.
        merged_adapters: merged adapters.
        requires_grad: adapter → whether it trains.
        available_adapters: all adapters.
        devices: adapter → kinds of device of its parameters.
        quantization_backend: as for a layer.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapted layer.

    Args:
        model: wrapped or not.

    Raises:
        StateError: it has no adapters.
    """
    found = find_adapted(model)
    if found is None:
        raise StateError(
            f"No adapter layers found in the model: this {type(model).__name__} carries no adapter"
        )
    root, state = found
    tuner = getattr(model, "base_model", None)
    wrapped = getattr(tuner, "model", None) is root
    active = list(tuner.active_adapters) if wrapped else list(state.active)  # type: ignore[union-attr]
    enabled = bool(state.merged or state.active) or not active
    merged, prefix = state.merged, "model." if wrapped else ""
    with behind_merge(root):
        return [
            _layer(prefix + place.path + _within(place.module), place.module, active, enabled, merged)
            for place in walk(root)
            if isinstance(place.module, AskedModule)
        ]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of a model's adapters.

    Args:
        model: wrapped or not.

    Raises:
        StateError: it has no adapters.
    """
    layers = get_layer_status(model)
    root, state = find_adapted(model) or (uncompiled(model), AdapterState())
    wrapped = root is not model
    names = sorted({name for layer in layers for name in layer.available_adapters})
    with as_unmerged(root):
        count = lorica.trainable_parameters(model)
    return TunerModelStatus(
        base_model_type=type(root).__name__,
        adapter_model_type="LoraModel" if wrapped else "None",
        peft_types=dict.fromkeys(state.configs, "LORA") if wrapped else {},
        trainable_params=count.trainable,
        total_params=count.total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=layers[0].active_adapters,
        merged_adapters=sorted(state.merged),
        requires_grad={
            name: _common(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in names
        },
        available_adapters=names,
        devices={
            name: sorted({kind for layer in layers for kind in layer.devices.get(name, ())}) for name in names
        },
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def _layer(
    name: str, module: AskedModule, active: list[str], enabled: bool, merged: Iterable[str]
) -> TunerLayerStatus:
    parts: dict[str, list[Parameter]] = {}
    for adapter, parameter in module.brought():
        parts.setdefault(adapter, []).append(parameter)
    return TunerLayerStatus(
        name=name,
        module_type=module_type(module),
        enabled=enabled,
        active_adapters=active,
        merged_adapters=[key for key in merged if key in parts],
        requires_grad={key: _common(p.requires_grad for p in values) for key, values in parts.items()},
        available_adapters=sorted(parts),
        devices={key: sorted({p.device.type for p in values}) for key, values in parts.items()},
        quantization_backend=quantization_backend(module),
    )


def _within(module: AskedModule) -> str:
    """The path of PEFT's layer below the module, by PEFT's names."""
    return ".token_adapter" if isinstance(module, TrainedTokens) else ""


def _common(values: Iterable[Any]) -> Any:
    """The common value, or "irregular"."""
    different = set(values)
    return different.pop() if len(different) == 1 else "irregular"
