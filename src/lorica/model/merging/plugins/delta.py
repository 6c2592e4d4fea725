"""The delta weight of an adapted layer: what merging adds to its W0."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lorica.choice import names_in
from lorica.errors import AdapterError, StateError, TargetError, nearest
from lorica.folding import one_thread
from lorica.layers import LoraLayer, lora_layers
from lorica.model.activate import active
from lorica.model.merging.folded import check_mergeable
from lorica.model.merging.merged import as_unmerged
from lorica.model.sharded import check_whole
from lorica.state import AdapterState, adapted


def delta_weight(model: nn.Module, path: str, name: str | Iterable[str] | None = None) -> Tensor:
    """The update that merging adds to a layer's weight, before the sum is rounded to the weight's dtype.

    For LoRA that is scale·B·A. DoRA's is what the scaling of the rows changes too; that of a start which was
    taken out of W0 (PiSSA, OLoRA, LoftQ, ...) is the difference to W0 itself. The model stays as it is.

    Args:
        model: adapted model; may be merged.
        path: path of an adapted layer, or of one of its weights if several are adapted
            (``experts.gate_up_proj``).
        name: an adapter's name, or several, whose delta weights add up; None takes the active ones, of a
            merged model those that are merged.

    Returns:
        A new tensor in the layout of the weight, in float32 or the weight's higher precision; no gradient.

    Raises:
        AdapterError: no such adapter, none that is active, or none that has an update there.
        TargetError: no adapted layer is there, or it has several adapted weights and `path` names none.
        StateError: the layer cannot be merged, packed weights are merged, or the model is sharded.
    """
    root, state = adapted(model)
    if state.merged and state.aside.into is not None:
        raise StateError("packed weights are merged; call lorica.restore(model) first")
    check_whole(root, "form a delta weight", "lorica.extract the adapter, whose factors have it")
    names = _names(state, name)
    with torch.no_grad(), one_thread(), as_unmerged(model), active(model, names):
        owner, layer, leaf = _find(root, path, names)
        check_mergeable({owner: layer}, names)
        weight = layer.merged_parameters(names)[leaf]
        original = state.originals.get(f"{owner}.{leaf}" if owner else leaf)
        if original is not None:
            W0 = original
        elif leaf == layer.weight_name:
            W0 = layer.base_rows(slice(None), weight.dtype).view(weight.shape)
        else:
            W0 = layer.get_base(leaf)
        return weight - W0.to(weight)


def _names(state: AdapterState, name: str | Iterable[str] | None) -> tuple[str, ...]:
    if name is None:
        chosen = state.merged or state.active
        if not chosen:
            raise AdapterError("no adapter is active; say whose delta weight is meant")
        return chosen
    return tuple(state.known(each) for each in names_in(name))


def _find(root: nn.Module, path: str, names: tuple[str, ...]) -> tuple[str, LoraLayer, str]:
    """The layer that `path` means, the layer's path, and the name of the parameter.

    Raises:
        AdapterError: none of the adapters has an update there.
        TargetError: the path means no adapted weight.
    """
    if not isinstance(path, str):
        raise TargetError(f"a layer's path is a text, not {path!r:.80}")
    layers = lora_layers(root)
    owner, _, leaf = path.rpartition(".")
    if path in layers:
        owner, leaf = path, ""
    elif owner not in layers:
        raise TargetError(f"no adapted layer is at {path!r}{nearest(path, layers)}")
    layer = layers[owner]
    if not any(name in layer.scaling for name in names):
        raise AdapterError(f"{owner}: {' and '.join(map(repr, names))} has no update there")
    changed = layer.changed(names)
    weights = [each for each in changed if each != "bias"]
    if not leaf and len(weights) == 1:
        leaf = weights[0]
    if leaf not in changed:
        raise TargetError(
            f"{path}: say which weight is meant: {', '.join(f'{owner}.{each}' for each in changed)}"
            if not leaf
            else f"{path} is changed by no adapter; those at {owner} change {', '.join(changed)}"
        )
    return owner, layer, leaf
