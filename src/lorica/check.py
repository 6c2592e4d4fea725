"""The kind of adapted layer that a module becomes; an update that would silently do nothing is refused."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lorica.errors import TargetError, TargetTypeError, listing
from lorica.layers import LoraLayer, LoraLinear, SwappedModule
from lorica.layers.kinds import KINDS, PARTS, READ, RULES
from lorica.layers.quantized import quantizer_of
from lorica.tree import Place

ADAPTABLE = (
    "nn.Linear and its subclasses, quantized layers, transformers' Conv1D, nn.Embedding, nn.Conv1d/2d/3d, "
    "nn.MultiheadAttention"
)


def layer_class(module: nn.Module, parent: nn.Module | None = None) -> type[LoraLayer] | None:
    """The kind of adapted layer that a module becomes; None if it cannot be adapted.

    Args:
        module: the module; an adapted one has its kind already.
        parent: the module that holds it, and may read its weight without calling it.
    """
    if isinstance(module, LoraLayer):
        return module.swapped_by  # pyright: ignore[reportReturnType]
    if _is_plain(module):
        found = next((kind for cls, kind in PARTS.items() if isinstance(parent, cls)), LoraLinear)
    else:
        found = next((kind for cls, kind in KINDS.items() if isinstance(module, cls)), None)
        for rule in RULES:
            found = rule(found, module)
    if found not in READ or parent is None or type(parent).__module__.startswith("torch.nn."):
        return found
    return READ[found](module, parent)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module multiplies as `nn.Linear` does, by a weight of plain numbers."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    weight: torch.Tensor = module.weight
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point()


def check_adaptable(place: Place, layer: type[LoraLayer]) -> None:
    """Refuse a module on which an update would have no effect or a wrong one.

    Args:
        place: the module's place.
        layer: the kind of layer that it would become.

    Raises:
        TargetError: naming the module and the remedy.
    """
    path, module, _ = place
    check_replaceable(path, module)
    check_free(path, module)
    layer.check_place(place)
    check_names(place, layer)
    if isinstance(module._parameters.get(layer.weight_name), UninitializedParameter):
        raise TargetError(
            f"{path} is a {type(module).__name__} whose shape is not known yet; run the model once, then "
            "adapt it"
        )


def check_free(path: str, module: nn.Module) -> None:
    """Refuse a module that another adapter has changed so that it takes no low-rank update.

    Raises:
        TargetError: naming the module.
    """
    if isinstance(module, SwappedModule) and (why := module.refusal()):
        raise TargetError(path + why)


def check_names(place: Place, layer: type[LoraLayer]) -> None:
    """Refuse a module that has an attribute under a name that the adapted layer needs.

    Raises:
        TargetError: naming the module and the attribute.
    """
    path, module, _ = place
    if isinstance(module, SwappedModule):
        return
    taken = [name for name in (*layer.own_modules, *layer.own_attributes) if hasattr(module, name)]
    if taken:
        raise TargetError(
            f"{path} is a {type(module).__name__} with {listing(taken)} of its own, and an adapted layer "
            "needs that name; rename the attribute, or leave the module out (exclude_modules)"
        )


def check_magnitudes(place: Place, layer: type[LoraLayer]) -> None:
    """Refuse DoRA on a module whose weight has no norm per row.

    Raises:
        TargetError: naming the module.
    """
    path, module, _ = place
    if not layer.has_rows(module):
        raise TargetError(
            f"{path}: DoRA needs the norms of W0's rows, and this {type(module).__name__} packs its weight "
            "in a way that lorica cannot read; set use_dora=False, or teach lorica the format with "
            "lorica.layers.quantized.register"
        )
    if getattr(module, "groups", 1) > 1:
        raise TargetError(
            f"{path}: in a grouped convolution the update and W0 see different channels, so no row has one "
            "norm; leave it out, or set use_dora=False"
        )


def check_bias(place: Place, layer: type[LoraLayer]) -> None:
    """Refuse a bias on B where the layer has no place for it.

    Raises:
        TargetError: naming the module.
    """
    if not layer.takes_bias:
        raise TargetError(
            f"lora_bias=True is not supported for {type(place.module).__name__} in this place: "
            f"{place.path}: lora_bias is for linear layers and convolutions that are called, not for a "
            f"{type(place.module).__name__} in this place; leave it out, or set lora_bias=False"
        )


def check_dropout(place: Place, layer: type[LoraLayer]) -> None:
    """Refuse to drop inputs where the update is folded into the weight.

    Raises:
        TargetError: naming the module.
    """
    if not layer.takes_dropout:
        raise TargetError(
            f"{place.path}: its weight is read without a call of the layer, so dropout has no input to "
            "act on; set lora_dropout=0, or leave it out (exclude_modules)"
        )


def check_replaceable(path: str, module: nn.Module) -> None:
    """Refuse a module whose forward was replaced on the instance, which bypasses an adapted class.

    Raises:
        TargetError: naming the module.
    """
    if "forward" in module.__dict__:
        raise TargetError(
            f"{path}: its forward was replaced on the module itself (as accelerate does to spread a model "
            "over devices), so an adapted class would be bypassed; adapt the model before that"
        )


def check_whole(path: str, module: nn.Module) -> None:
    """Refuse a module that cannot be trained whole.

    Raises:
        TargetError: naming the module.
    """
    check_replaceable(path, module)
    if isinstance(module, _CONTAINERS):
        parts = [
            f"{path}.{name}"
            for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))
        ]
        raise TargetTypeError(
            f"modules_to_save cannot be applied to modules of type {type(module)}: {path} is never called, "
            f"so a copy of it would do nothing; name what is in it: {listing(parts)}"
        )
    adapted: dict[str, list[str]] = {}
    for name, part in module.named_modules(prefix=path):
        if isinstance(part, SwappedModule) and part.in_whole:
            adapted.setdefault(part.in_whole, []).append(name)
    for why, names in adapted.items():
        raise TargetError(f"{path} cannot be trained whole: {why.format(listing(names))}")
    packed = [name for name, part in module.named_modules(prefix=path) if quantizer_of(part) is not None]
    if packed:
        raise TargetError(
            f"{path} cannot be trained whole: the weight of {packed[0]} is quantized; leave it out when "
            f"the model is quantized (transformers: llm_int8_skip_modules=[{path!r}])"
        )


_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
