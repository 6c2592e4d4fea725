"""What a wrapper asks of the model in it, and does to it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

import lorica
from lorica.config import LoraConfig
from lorica.errors import LoricaWarning
from lorica.layers import AskedModule
from lorica.model.selection import HEADS
from lorica.model.structure import base_parameters, find_adapted, lora_layers, saved_modules, walk
from lorica.state import parameter_at


def recomputes(model: nn.Module) -> bool:
    """Whether a model recomputes activations; of one that does not say it may be so."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    name = next((name for name in names if hasattr(type(model), name)), None)
    return True if name is None else bool(getattr(model, name))


def named_whole(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The configuration with names of whole parts for what `modules_to_save` means in PEFT.

    There a name is any ending of a module's: "norm" means every ``input_layernorm`` too, and "head" an
    ``lm_head``.

    Args:
        model: the base.
        config: as it was given.
    """
    given, heads = config.modules_to_save or [], HEADS.get(config.task_type or "", ())
    paths = [place.path for place in walk(model) if place.path]
    names: list[str] = []
    for name in dict.fromkeys([*given, *heads]):
        parts = name.count(".") + 1
        endings = [".".join(path.split(".")[-parts:]) for path in paths if path.endswith(name)]
        names += endings or [name]
    names = [name for name in dict.fromkeys(names) if name in given or name not in heads]
    return config if names == given else config.replace(modules_to_save=names)


def let_gradients_in(model: nn.Module) -> None:
    """Let the embeddings' output carry gradients: a recomputed block with a frozen input would have none."""
    quantized = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
    if any(getattr(model, flag, False) for flag in quantized):
        return
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # pyright: ignore[reportCallIssue]
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grads)  # pyright: ignore


def match_base_dtype(model: nn.Module, name: str) -> None:
    """Give an adapter's updates, and its copies of whole modules, the base's dtype.

    Args:
        model: the base.
        name: of the adapter.
    """
    for layer in lora_layers(model).values():
        for _, live, holder in layer.holders(name) if name in layer.scaling else ():
            weight = layer._parameters.get(live.rpartition(".")[2] or layer.weight_name)
            more = (holder.magnitude_parameter(name), holder.bias_parameter(name))
            for parameter in (*holder.factor_parameters(name), *more):
                if parameter is not None and weight is not None and weight.is_floating_point():
                    parameter.data = parameter.data.to(weight.dtype)
    for module in saved_modules(model).values():
        if name in module.masters:
            for path, parameter in module.modules_to_save[name].named_parameters():
                parameter.data = parameter.data.to(parameter_at(module, path).dtype)


def put_again(model: nn.Module, name: str, put: Callable[[str], object]) -> None:
    """Put an adapter on a model; one of that name that is there gives way to it, as in PEFT.

    Args:
        model: the base, without a wrapper.
        name: of the adapter.
        put: puts it on under a name.

    Warns:
        LoricaWarning: the model carries adapters already.
    """
    found = find_adapted(model)
    if found is not None:
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model "
            "with a different config, make sure to call `.unload()` before. "
            + (
                f"The adapter {name!r} that is there gives way"
                if name in found[1].configs
                else "The others stay"
            ),
            LoricaWarning,
            stacklevel=4,
        )
    if found is None or name not in found[1].configs:
        put(name)
        return
    trial = f"{name}-again"  # what cannot be put on leaves the one that is there
    with torch.random.fork_rng(devices=[]):
        put(trial)
    lorica.detach(model, trial)
    lorica.detach(model, name)
    put(name)


def say_untied(model: nn.Module, *, by_merge: bool) -> None:
    """Say that a model's tables are not tied; its configuration must not say that they are.

    Args:
        model: merged model.
        by_merge: whether merging untied them. If not, the configuration may have been wrong before.

    Warns:
        LoricaWarning: they are not, and the configuration said so, or says so no longer.
    """
    config: Any = getattr(model, "config", None)
    if not by_merge and getattr(config, "tie_word_embeddings", None) is True:
        tables: list[Any] = []
        for get in ("get_input_embeddings", "get_output_embeddings"):
            with contextlib.suppress(AttributeError, NotImplementedError):
                tables.append(getattr(getattr(model, get)(), "weight", None))
        by_merge = (
            len(tables) == 2 and all(table is not None for table in tables) and tables[0] is not tables[1]
        )
        config.tie_word_embeddings = not by_merge
    if by_merge:
        warnings.warn(
            "Input and output embeddings are no longer tied after merging. Setting "
            "`tie_word_embeddings=False` in the model config.",
            LoricaWarning,
            stacklevel=3,
        )


def to_meta(model: nn.Module, name: str) -> None:
    """Let an adapter's parameters be without values, on the meta device, until they are loaded."""
    moved: dict[Parameter, Parameter] = {}
    for tables, leaf in _brought(model, name):
        was = tables[leaf]
        empty = Parameter(torch.empty_like(was, device="meta"), requires_grad=was.requires_grad)
        tables[leaf] = moved.setdefault(was, empty)


def from_meta(model: nn.Module, name: str) -> None:
    """Give an adapter's parameters that are without values room where the base is."""
    moved: dict[Parameter, Parameter] = {}
    devices = [p.device for p in base_parameters(model).values() if not p.is_meta]
    for tables, leaf in _brought(model, name):
        was = tables[leaf]
        if was.is_meta and devices:
            full = Parameter(torch.empty_like(was, device=devices[0]), requires_grad=was.requires_grad)
            tables[leaf] = moved.setdefault(was, full)


def on_meta(model: nn.Module, name: str) -> bool:
    """Whether an adapter is without values."""
    return any(tables[leaf].is_meta for tables, leaf in _brought(model, name))


def _brought(model: nn.Module, name: str) -> list[tuple[dict[str, Any], str]]:
    """Where the parameters of an adapter stand: the tables that hold them, and their names there."""
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


def _require_grads(module: nn.Module, args: object, output: Tensor) -> None:
    output.requires_grad_(True)
