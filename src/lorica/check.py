"""Which kind of adapted layer a module becomes; an update that would silently do nothing is refused."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lorica.errors import TargetError, TargetTypeError, listing
from lorica.layers import (
    AddedModule,
    LoraAttention,
    LoraAttentionOutput,
    LoraConv,
    LoraConv1D,
    LoraEmbedding,
    LoraLayer,
    LoraLinear,
    LoraOpaque,
    LoraParameters,
    LoraQuantized,
    LoraReadLinear,
    ReadWeight,
    SavedModule,
    SwappedModule,
    TrainedTokens,
    reading_of,
)
from lorica.layers.quantized import is_unfinished, quantizer_of
from lorica.layers.read import LoraOwnConv, LoraOwnLinear, read_kind, returns_other
from lorica.tree import Place, only_holds, tied_with

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
    layer = _kind(module, parent)
    if layer is None or parent is None or type(parent).__module__.startswith("torch.nn."):
        return layer
    reading = reading_of(module, parent)
    return read_kind(layer, module, called=reading.called) if reading.read else layer


def _kind(module: nn.Module, parent: nn.Module | None) -> type[LoraLayer] | None:
    """The kind of layer by the module alone, whatever its parent reads."""
    if isinstance(module, nn.MultiheadAttention):
        return LoraAttention
    plain = (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and _is_plain(module.weight)
    )
    if not plain and quantizer_of(module) is not None and not isinstance(module, nn.Embedding):
        return LoraQuantized
    if isinstance(module, nn.Linear):
        if not plain:
            return LoraOwnLinear if returns_other(module) else LoraOpaque
        if isinstance(parent, nn.MultiheadAttention):
            return LoraAttentionOutput
        return LoraReadLinear if isinstance(parent, nn.TransformerEncoderLayer) else LoraLinear
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return LoraOwnConv if returns_other(module) else LoraConv
    # A Conv1D exists only if its module was imported, and importing transformers here would take seconds.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    if pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D):
        own_forward = type(module).forward is not pytorch_utils.Conv1D.forward
        return None if own_forward else LoraConv1D
    if not _is_linear_like(module):
        return None
    return LoraOwnLinear if returns_other(module) else LoraOpaque


def _is_linear_like(module: nn.Module) -> bool:
    """Whether a module other than `nn.Linear` declares itself linear, and holds no other modules."""
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(width, int) and width > 0 for width in widths) and not module._modules


def _is_plain(weight: torch.Tensor) -> bool:
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point()


def check_adaptable(place: Place, layer: type[LoraLayer]) -> None:
    """Refuse a module on which an update would have no effect or a wrong one.

    Args:
        place: the module's place.
        layer: the kind of layer that it would become.

    Raises:
        TargetError: naming the module and the remedy.
    """
    path, module, parent = place
    kind = type(module).__name__
    check_replaceable(path, module)
    if isinstance(module, TrainedTokens):
        raise TargetError(
            f"{path}: another adapter trains rows of it (trainable_token_indices), so it cannot take a "
            "low-rank update beside that"
        )
    if layer is LoraAttention and not module._qkv_same_embed_dim:
        raise TargetError(
            "Only same embed for query/key/value is supported as of now for MultiheadAttention: "
            f"{path} is an nn.MultiheadAttention with kdim or vdim of its own, and has no single weight to "
            "adapt; target its out_proj"
        )
    weight = module._parameters.get(layer.weight_name)
    if weight is not None and weight.is_complex():
        raise TargetError(
            f"{path}: its weight is {weight.dtype}, and lorica's updates are real; leave it out"
        )
    if weight is None and (isinstance(module, nn.Linear) or not issubclass(layer, LoraOpaque)):
        raise TargetError(
            f"{path}: its {layer.weight_name} is computed (weight_norm, parametrize), so there is no "
            "parameter to update; remove the parametrization first"
        )
    if issubclass(layer, LoraLinear) and "bias" not in module._parameters:
        raise TargetError(
            f"{path}: its bias is computed (prune, parametrize), so the adapted layer has none to read; make "
            "it a parameter first (torch.nn.utils.prune.remove, remove_parametrizations)"
        )
    _check_names(place, layer)
    if isinstance(weight, UninitializedParameter):
        raise TargetError(
            f"{path} is a {kind} whose shape is not known yet; run the model once, then adapt it"
        )
    if issubclass(layer, LoraOpaque) and is_unfinished(module):
        raise TargetError(
            f"{path} is a {kind} that packs its weight when it is moved to its device; move the model there "
            "first (model.to(...)), then adapt it"
        )
    if issubclass(layer, LoraOpaque) and _read_past_its_forward(place):
        raise TargetError(
            f"{path} is a {kind} with a forward of its own, but {type(parent).__name__} reads its weight "
            "without calling it, so the update would not act"
        )
    if issubclass(layer, ReadWeight) and getattr(module, "groups", 1) > 1:
        raise TargetError(
            f"{path}: the weight of this convolution is read past its forward, and with {module.groups} "
            "groups it has no place for the update, which sees every channel; leave it out (exclude_modules)"
        )
    if issubclass(layer, LoraEmbedding) and _looks_up_otherwise(module):
        raise TargetError(
            f"{path} is a {kind} with a forward of its own, which may look up other rows than it is given; "
            "lorica adapts embeddings that look up as nn.Embedding does"
        )


def _check_names(place: Place, layer: type[LoraLayer]) -> None:
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
    weight = module._parameters.get(layer.weight_name)
    readable = weight is not None and weight.is_floating_point()
    if not readable and not issubclass(layer, LoraQuantized):
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


def check_looked_up(places: Iterable[Place], chosen: Collection[str]) -> None:
    """Refuse an embedding that is never called and only holds the table for others, as T5's `shared`.

    Args:
        places: the places of the whole model.
        chosen: paths of the modules to adapt or to train whole.

    Raises:
        TargetError: naming the embedding and those that look up in its table.
    """
    embeddings = [p for p in places if isinstance(p.module, nn.Embedding)]
    for place in embeddings:
        if place.path not in chosen:
            continue
        others = [path for path in tied_with(embeddings, place.module) if path != place.path]
        if only_holds(place, others):
            raise TargetError(
                f"{place.path} only holds the table that {listing(others)} look up in, and is not called "
                f"itself, so an update of it would not act; name {listing(others)} instead, or single rows "
                "in trainable_token_indices, which all of them share"
            )


def check_rows(place: Place, indices: Iterable[int]) -> None:
    """Refuse a module whose rows cannot be trained by themselves.

    Raises:
        TargetError: naming the module.
    """
    path, module, parent = place
    if not isinstance(module, TrainedTokens):
        kind = type(module).__name__
        if isinstance(module, (LoraLayer, SavedModule)):
            raise TargetError(f"{path}: another adapter has made it a {kind}; leave out its tokens")
        layer = layer_class(module, parent)
        if layer not in (LoraEmbedding, LoraLinear):
            raise TargetError(
                f"{path} is a {kind}; trainable_token_indices takes embeddings, and plain linear heads"
            )
        check_adaptable(place, layer)
        if getattr(module, "max_norm", None) is not None:
            raise TargetError(
                f"{path} rescales its rows when it looks them up (max_norm), so trained rows would not "
                "stay as trained; leave out its tokens"
            )
    rows = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    beyond = [str(index) for index in indices if index >= rows]
    if beyond:
        raise TargetError(
            f"{path} has {rows} rows, and trainable_token_indices names {listing(beyond)}; resize it first "
            "(model.resize_token_embeddings)"
        )


def check_parameter(place: Place, leaf: str) -> None:
    """Refuse a parameter on which an update would have no effect, or that is no matrix.

    Raises:
        TargetError: naming the parameter.
    """
    name, module = f"{place.path}.{leaf}", place.module
    check_replaceable(place.path, module)
    _check_names(place, LoraParameters)
    if isinstance(module, SwappedModule) and not isinstance(module, LoraParameters):
        raise TargetError(
            f"{name}: another adapter has made {place.path} a {type(module).__name__}; adapt it as a module, "
            "or leave it out of target_parameters"
        )
    weight = module._parameters[leaf]
    if weight is None or not weight.is_floating_point() or weight.dim() not in (2, 3):
        what = "None" if weight is None else f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise TargetError(
            f"{name} is {what}; target_parameters takes floating-point matrices (d_out, d_in) and stacks of "
            "them (experts, ...)"
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
    adapted = [
        name for name, part in module.named_modules(prefix=path) if isinstance(part, LoraLayer | AddedModule)
    ]
    if adapted:
        raise TargetError(f"{path} cannot be trained whole: another adapter adapts {listing(adapted)} in it")
    if any(isinstance(part, TrainedTokens) for part in module.modules()):
        raise TargetError(
            f"{path} cannot be trained whole: another adapter trains rows of it (trainable_token_indices)"
        )
    packed = [name for name, part in module.named_modules(prefix=path) if quantizer_of(part) is not None]
    if packed:
        raise TargetError(
            f"{path} cannot be trained whole: the weight of {packed[0]} is quantized; leave it out when "
            f"the model is quantized (transformers: llm_int8_skip_modules=[{path!r}])"
        )


_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def _read_past_its_forward(place: Place) -> bool:
    parent = place.parent
    packed = isinstance(place.module, LoraQuantized) or quantizer_of(place.module) is not None
    return (
        (not packed and reading_of(place.module, parent).read)
        or isinstance(parent, nn.MultiheadAttention)
        or (
            isinstance(parent, nn.TransformerEncoderLayer)
            and type(parent).forward is nn.TransformerEncoderLayer.forward
        )
    )


def _looks_up_otherwise(module: nn.Module) -> bool:
    """Whether an embedding's own forward does more than scale the rows it looks up (Gemma's and BART's)."""
    own_class = module.base_class if isinstance(module, LoraLayer) else type(module)
    return own_class.forward is not nn.Embedding.forward and not hasattr(module, "embed_scale")
