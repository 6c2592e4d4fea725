"""The moment an adapter goes onto a model: classes are swapped and parameters handed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.adapter import check_name
from lorica.config import LoraConfig
from lorica.errors import AdapterError
from lorica.layers import LoraLayer, LoraParameters, SavedModule
from lorica.layers.quantized import hold_layout
from lorica.model import pretrained
from lorica.model.structure import ROSTER, base_parameters, find_adapted
from lorica.model.targets import Target
from lorica.roster import Roster


class Mount(NamedTuple):
    """A target with the parameters it is about to get."""

    target: Target
    A: Parameter
    B: Parameter
    scale: float
    magnitude: Parameter | None = None
    bias: Parameter | None = None


def open_for(model: nn.Module, name: str) -> tuple[nn.Module, Roster]:
    """The adapted model in `model` and its roster; where there is none yet, `model` and a new roster.

    Raises:
        AdapterError: the name is taken, or cannot be one.
        StateError: an adapter is merged.
    """
    check_name(name)
    root, roster = find_adapted(model) or (model, Roster())
    roster.check_unmerged("add an adapter")
    if name in roster.configs:
        raise AdapterError(
            f"the model already has an adapter named {name!r}; give another name, or "
            f"lorica.detach(model, {name!r}) first"
        )
    return root, roster


def parameter_for(target: Target, factor: Tensor, *, copy: bool) -> Parameter:
    """The factor as a parameter on the layer's device, in float32 or the layer's higher precision.

    Args:
        target: what the factor is for.
        factor: its values.
        copy: whether it must have memory of its own.
    """
    anchor = target.anchor
    precision, device = torch.float32, None
    if anchor is not None:
        device = anchor.device
        if anchor.is_floating_point():
            precision = torch.promote_types(anchor.dtype, torch.float32)
    return Parameter(factor.detach().to(device=device, dtype=precision, copy=copy).contiguous())


def mount(
    root: nn.Module,
    roster: Roster,
    name: str,
    config: LoraConfig,
    mounts: list[Mount],
    saved: Mapping[str, nn.Module],
    slots: Mapping[str, Parameter],
    *,
    trainable: bool,
) -> None:
    """Put an adapter's parameters on the model; the base is frozen when the first one comes.

    Args:
        root: the model.
        roster: the model's, or a new one.
        name: of the adapter.
        config: how it was made.
        mounts: targets with their factors.
        saved: path → module to give a copy that is trained whole.
        slots: parameter name → parameter that takes its place while the adapter acts.
        trainable: whether all of these train.
    """
    if not roster.configs:
        roster.frozen = [parameter for parameter in base_parameters(root).values() if parameter.requires_grad]
        for parameter in roster.frozen:
            parameter.requires_grad_(False)
        roster.layouts = hold_layout(root)
        setattr(root, ROSTER, roster)
        pretrained.enter(root)
    roster.configs[name] = config
    for target, A, B, scale, magnitude, bias in mounts:
        module = target.module
        host = module if isinstance(module, LoraLayer) else target.layer.take(module, roster)
        if isinstance(host, LoraParameters):
            assert target.parameter is not None
            host.add_parameter(name, target.parameter, _train(A, trainable), _train(B, trainable), scale)
            continue
        host.add_factors(name, _train(A, trainable), _train(B, trainable), scale, config.lora_dropout)
        if magnitude is not None:
            host.add_magnitude(name, _train(magnitude, trainable))
        if bias is not None:
            host.add_bias(name, _train(bias, trainable))
    if saved:
        roster.whole[name] = tuple(saved)
    for module in saved.values():
        host = module if isinstance(module, SavedModule) else SavedModule.take(module, roster)
        host.add_copy(name, trainable=trainable)
    if slots:
        roster.slots[name] = {path: _train(parameter, trainable) for path, parameter in slots.items()}


def _train(parameter: Parameter, trainable: bool) -> Parameter:
    parameter.requires_grad = trainable
    return parameter
