"""Compute the merged parameters, and what rounding loses; the model does not change here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lorica.adapter import Factors
from lorica.errors import StateError, listing
from lorica.folding import check_finite, each_on_one_thread, one_thread
from lorica.layers import LoraLayer


def check_mergeable(layers: Mapping[str, LoraLayer], names: tuple[str, ...]) -> None:
    """Refuse layers that cannot hold a merged weight; the layers are in their adapted form."""
    for path, layer in layers.items():
        gone = [leaf for leaf in layer.changed(names) if leaf not in layer._parameters]
        if gone and not layer.opaque:
            raise StateError(
                f"{path}: its {listing(gone)} is computed since it was adapted (prune, weight_norm, "
                "parametrize), so there is none to put the update into; make it a parameter first "
                "(prune.remove, remove_parametrizations)"
            )
        held = [layer._parameters[leaf] for leaf in layer.changed(names) if leaf not in gone]
        if any(parameter is not None and parameter.is_meta for parameter in held):
            raise StateError(
                f"{path}: its weight is on the meta device, without values (accelerate's offloading?); bring "
                "it back first (accelerate.hooks.remove_hook_from_module(model, recurse=True)), or merge "
                "before"
            )
        try:
            layer.check_mergeable()
            layer.check_bias(names)
        except StateError as error:
            raise StateError(f"{path}: {error}") from None


def merged_states(
    layers: Mapping[str, LoraLayer], names: tuple[str, ...], plain: torch.dtype | None
) -> dict[str, dict[str, Any]]:
    """Path → name → the base's new value; with a dtype, packed weights become plain ones of that dtype."""
    parameters = {path: room(layer, names, {}) for path, layer in layers.items() if not layer.packed}
    fold_all(layers, parameters, names)
    for path, own in parameters.items():
        for leaf, parameter in own.items():
            check_finite(path, leaf, parameter)
    with one_thread():
        return {
            path: parameters[path] if path in parameters else _packed_state(path, layer, names, plain)
            for path, layer in layers.items()
        }


def _packed_state(
    path: str, layer: LoraLayer, names: tuple[str, ...], plain: torch.dtype | None
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    try:
        for leaf, part in layer.merged_parameters(names).items():
            if plain is not None and leaf == layer.weight_name:
                state[leaf] = Parameter(part.to(plain), requires_grad=False)
            else:
                state |= layer.storing(leaf, part)
            check_finite(path, leaf, state[leaf] if type(state[leaf]) is Parameter else part)
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    return state


def may_overflow(layer: LoraLayer, name: str) -> bool:
    """Whether the factors are so large that a finite W0 may give an infinite merged weight.

    ``|s·B·A| ≤ s·r·max|A|·max|B|``, and adding less than half of the last place of a dtype's largest number
    cannot overflow. A check of the merged weights themselves would take a good part of the merge's time.
    """
    limits = [torch.finfo(layer.get_base(leaf).dtype) for leaf in layer.changed((name,))]
    limit = min(info.max * info.eps / 4 for info in limits)
    for _, _, holder in layer.holders(name):
        factors: Factors = holder.factors(name)
        if factors.magnitude is not None or factors.bias is not None:
            return True
        sizes = [factor.abs().max().item() for factor in (factors.A, factors.B)]
        if not abs(factors.scale) * factors.r * sizes[0] * sizes[1] < limit:  # as NaN is not
            return True
    return False


def room(layer: LoraLayer, names: tuple[str, ...], held: dict[str, Parameter]) -> dict[str, Parameter]:
    """Name → a parameter for the merged values: one of `held` if it fits, or a new one."""
    return {leaf: _like(layer.get_base(leaf), held.get(leaf)) for leaf in layer.changed(names)}


def _like(base: Parameter, held: Parameter | None) -> Parameter:
    if held is not None and held.device == base.device and held.dtype == base.dtype:
        return held
    with torch.inference_mode(False):  # tensors made in that mode could not be written to outside it
        return Parameter(torch.empty_like(base), requires_grad=False)


def fold_all(
    layers: Mapping[str, LoraLayer], merged: Mapping[str, Mapping[str, Parameter]], names: tuple[str, ...]
) -> None:
    """Write W0 plus the named adapters' delta weights into the merged parameters of each layer."""
    targets = {path: {leaf: p.detach() for leaf, p in own.items()} for path, own in merged.items()}
    each_on_one_thread(
        lambda path: layers[path].merged_parameters(names, out=targets[path]),
        targets,
        at_once=all(tensor.device.type == "cpu" for own in targets.values() for tensor in own.values()),
    )


@dataclass(frozen=True)
class MergeReport:
    """The loss of a merge to rounding.

    Args:
        names: the merged adapters.
        layers: module path → ‖stored − (W0 + ΔW)‖ / ‖ΔW‖ (Frobenius): the error of rounding to the weight's
            dtype, relative to the update. 0 is exact; at 1 the error is as large as the update.
        untied: modules that shared a parameter and now have one each.
    """

    names: tuple[str, ...]
    layers: dict[str, float]
    untied: list[str] = field(default_factory=list)

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error, and that error."""
        return max(self.layers.items(), key=lambda item: item[1], default=("", 0.0))

    def __str__(self) -> str:
        """One line per layer, the worst first."""
        merged = f"merged {listing(self.names)} into {len(self.layers)} layers"
        rows = sorted(self.layers.items(), key=lambda item: -item[1])
        tail = [f"no longer tied: {listing(self.untied)}"] if self.untied else []
        return "\n".join(
            [
                f"{merged}; share of each update lost to rounding:",
                *(f"  {loss:9.2e}  {path}" for path, loss in rows),
                *tail,
            ]
        )


def rounding_loss(layer: LoraLayer, names: Iterable[str], stored: Tensor, *, rows: int = 1024) -> float:
    """‖stored − (W0 + ΔW)‖ / ‖ΔW‖ in float64, computed by blocks of rows.

    Args:
        layer: adapted layer that still holds W0.
        names: adapters whose updates make up ΔW.
        stored: the merged weight, of W0's shape.
        rows: rows per block; bounds the memory.
    """
    W = stored.detach().flatten(1)
    products = [
        (name, *layer.delta_factors(name, torch.float64), layer.scaling[name], layer.variants[name])
        for name in names
        if name in layer.scaling
    ]
    turning = {
        name: variant.turning(layer, name, torch.float64) for name, *_, variant in products if variant.turns
    }
    lost = total = 0.0
    for i in range(0, W.shape[0], rows):
        part = slice(i, i + rows)
        base = layer.base_rows(part, torch.float64)
        delta = torch.zeros_like(base)
        for name, left, right, scale, _ in products:
            update = scale * (left[part] @ right)
            if name in turning:
                own = layer.rows_beside(name, part, torch.float64)
                update = turning[name](own, own + update, part).detach() - own
            delta += update
        lost += float((W[part].double() - base - delta).square().sum())
        total += float(delta.square().sum())
    return (lost / total) ** 0.5 if total else 0.0


def state_loss(layer: LoraLayer, names: tuple[str, ...], state: dict[str, Any]) -> float:
    """`rounding_loss` of what `merged_states` returned."""
    found = layer.lost(names, state)
    if found is None:
        return rounding_loss(layer, names, layer.stored(state))
    lost, total = found
    return (lost / total) ** 0.5 if total else 0.0
