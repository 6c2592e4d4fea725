"""Other libraries: those that know PEFT's models by their class, quantizers, DeepSpeed, the meta device.

transformers' Trainer, accelerate and TRL ask `isinstance(model, peft.PeftModel)` before they save, resume or
freeze anything, and offer no other way to opt in. So the model answers yes, as `unittest.mock` does: by
`__class__`, while `type(model)`, and with it every method, stays lorica's. Without PEFT nobody asks; then
transformers' function that would ask is replaced by one that knows lorica's models.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.errors import ConfigError
from lorica.layers import AskedModule
from lorica.layers.quantized import quantizer_of, registry
from lorica.model.pretrained import configurations
from lorica.state import find_adapted
from lorica.tree import base_parameters, walk

_CLASS = object.__dict__["__class__"]
_ASKS = "_is_peft_model"
_MIXIN = "transformers.integrations.peft"


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
    """If PEFT is not installed, make transformers' Trainer treat `known` as PEFT's models."""
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


def tell_users() -> None:
    """Make TRL's trainers and transformers' models accept lorica's configurations in place of PEFT's.

    Called when a configuration is made, for the libraries loaded by then.
    """
    if "trl" in sys.modules:
        peft = importlib.import_module("lorica.peft")
        configurations.take(peft.PeftConfig, peft.get_peft_model)
    if "transformers.models.auto.modeling_auto" in sys.modules:  # loaded with any model
        with contextlib.suppress(ImportError):
            importlib.import_module(_MIXIN)
    mixin: Any = getattr(sys.modules.get(_MIXIN), "PeftAdapterMixin", None)
    if mixin is not None and not hasattr(mixin.add_adapter, "knows_lorica"):
        for name, ours in _METHODS.items():
            setattr(mixin, name, _by_model(getattr(mixin, name), ours))


def _by_model(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A method of transformers' models: lorica's if lorica adapted the model or made the configuration."""
    peft = importlib.import_module("lorica.peft")

    @functools.wraps(theirs)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = (*args[:1], kwargs.get("adapter_config"))
        own = find_adapted(self) is not None or any(isinstance(each, peft.PeftConfig) for each in given)
        return ours(peft, self, *args, **kwargs) if own else theirs(self, *args, **kwargs)

    method.knows_lorica = True  # type: ignore[attr-defined]
    return method


def _add_adapter(peft: Any, model: nn.Module, adapter_config: Any, adapter_name: str | None = None) -> None:
    tuner, name = peft.LoraModel(model, None), adapter_name or "default"
    tuner.inject_adapter(peft.config.as_peft_config(adapter_config), name)
    tuner.set_adapter(name)


def _load_adapter(
    peft: Any, model: nn.Module, peft_model_id: Any = None, adapter_name: str | None = None, **options: Any
) -> Any:
    if peft_model_id is None:
        raise ConfigError(
            "load_adapter of a model that lorica adapted takes a folder or a name on the Hub; for tensors, "
            "add_adapter(config) and set_peft_model_state_dict(model, tensors)"
        )
    return peft.PeftModel._around(model).load_adapter(peft_model_id, adapter_name or "default", **options)


def _delete_adapter(peft: Any, model: nn.Module, adapter_names: str | list[str]) -> None:
    tuner = peft.LoraModel(model, None)
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    for name in names:
        tuner.adapter_state.known(name)
    for name in names:
        tuner.delete_adapter(name)


def _state_dict(peft: Any, model: nn.Module, adapter_name: str | None = None, state_dict: Any = None) -> Any:
    name = adapter_name or peft.LoraModel(model, None).first_active
    return peft.get_peft_model_state_dict(model, state_dict, name)


# Methods that transformers gives its models for PEFT's adapters → what they do with lorica's.
_METHODS: dict[str, Callable[..., Any]] = {
    "add_adapter": _add_adapter,
    "load_adapter": _load_adapter,
    "delete_adapter": _delete_adapter,
    "get_adapter_state_dict": _state_dict,
    "set_adapter": lambda peft, model, name: peft.LoraModel(model, None).set_adapter(name),
    "disable_adapters": lambda peft, model: peft.LoraModel(model, None).disable_adapter_layers(),
    "enable_adapters": lambda peft, model: peft.LoraModel(model, None).enable_adapter_layers(),
    "active_adapters": lambda peft, model: peft.LoraModel(model, None).active_adapters,
}


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """A layer's weight, unpacked; a plain weight as it is.

    Args:
        module: a layer with a `weight`, adapted or not.
    """
    if quantizer_of(module) is None:
        weight = module._parameters.get("weight")
        return module.weight if weight is None else weight  # type: ignore[return-value]
    return registry.dequantize(module)


def check_deepspeed_zero3_enabled() -> bool:
    """Whether DeepSpeed shards parameters in this process."""
    deepspeed = sys.modules.get("transformers.integrations.deepspeed")
    return deepspeed is not None and bool(deepspeed.is_deepspeed_zero3_enabled())


def to_meta(model: nn.Module, name: str) -> None:
    """Put an adapter's parameters on the meta device, without values, until they are loaded."""
    moved: dict[Parameter, Parameter] = {}
    for tables, leaf in _brought(model, name):
        was = tables[leaf]
        empty = Parameter(torch.empty_like(was, device="meta"), requires_grad=was.requires_grad)
        tables[leaf] = moved.setdefault(was, empty)


def from_meta(model: nn.Module, name: str) -> None:
    """Allocate an adapter's parameters that have no values, on the base's device."""
    moved: dict[Parameter, Parameter] = {}
    devices = [p.device for p in base_parameters(model).values() if not p.is_meta]
    for tables, leaf in _brought(model, name):
        was = tables[leaf]
        if was.is_meta and devices:
            full = Parameter(torch.empty_like(was, device=devices[0]), requires_grad=was.requires_grad)
            tables[leaf] = moved.setdefault(was, full)


def on_meta(model: nn.Module, name: str) -> bool:
    """Whether an adapter has parameters without values."""
    return any(tables[leaf].is_meta for tables, leaf in _brought(model, name))


def _brought(model: nn.Module, name: str) -> list[tuple[dict[str, Any], str]]:
    """The tables that hold an adapter's parameters, with the parameters' names in them."""
    own = {
        id(parameter)
        for place in walk(model)
        if isinstance(place.module, AskedModule)
        for adapter, parameter in place.module.brought()
        if adapter == name
    }
    return [
        (module._parameters, leaf)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if id(parameter) in own
    ]
