"""Trying out a forward that lorica does not know, before an update goes into the weight behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.errors import StateError
from lorica.layers.base import LoraLayer


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether a class does something else than the layer of torch's that it is a kind of."""
    known = next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn."))
    return cls.forward is not known.forward


def check_multiplies(layer: LoraLayer, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Refuse to merge where adding to the weight is not adding the update to the output.

    A layer that scales or normalises what it computes gets the update added after that while it is adapted,
    and before that once it is merged; the two would differ.

    Args:
        layer: adapted layer whose base has a forward of its own.
        x: an input for it.
        multiply: an input and a weight → their product, as torch's own layer has it.

    Raises:
        StateError: a change of the weight does not come out as its product with the input.
    """
    kind, weight = layer.base_class.__name__, layer.base_weight
    change = torch.randn_like(weight) * weight.detach().float().std().to(weight.dtype)
    training = layer.training
    try:
        layer.training = False
        with torch.no_grad():
            before = layer.base_class.forward(layer, x)
            layer._parameters[layer.weight_name] = Parameter(weight + change, requires_grad=False)
            after = layer.base_class.forward(layer, x)
    except Exception as error:
        raise StateError(
            f"the forward of {kind} cannot be tried out ({error}), so it is not known how to merge"
        ) from error
    finally:
        layer._parameters[layer.weight_name] = weight  # pyright: ignore[reportArgumentType]
        layer.training = training
    expected = multiply(x, change).float()
    tolerance = 16 * torch.finfo(weight.dtype).eps ** 0.5 * expected.abs().max()
    if not bool(((after - before).float() - expected).abs().max() <= tolerance):
        raise StateError(
            f"{kind} does more than multiply by its weight, so a merged update would act otherwise; "
            "leave it out of what is merged, or use the adapter unmerged"
        )
