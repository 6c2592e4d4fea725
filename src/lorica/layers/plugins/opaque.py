"""Linear layers of unknown kinds: with a forward of their own, or a weight packed in an unknown format."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from lorica import functional
from lorica.errors import StateError, TargetError
from lorica.layers.base import LoraLayer
from lorica.layers.kinds import RULES
from lorica.layers.linear import conv1d_class
from lorica.layers.plugins.reading import reading_of
from lorica.tree import Place


class LoraOpaque(LoraLayer):
    """Any other linear layer; the update is added to the output of its own forward.

    It is a subclass of `nn.Linear`, or a module with `in_features` and `out_features`, such as the layers of
    GPTQ, AWQ and HQQ.
    """

    opaque: ClassVar[bool] = True

    @classmethod
    def check_place(cls, place: Place) -> None:  # noqa: D102
        super().check_place(place)
        if cls.is_read(place):
            raise TargetError(
                f"{place.path} is a {type(place.module).__name__} with a forward of its own, but "
                f"{type(place.parent).__name__} reads its weight without calling it, so the update would not "
                "act"
            )

    @classmethod
    def is_read(cls, place: Place) -> bool:
        """Whether a module's parent reads its weight without calling it."""
        return reading_of(place.module, place.parent).read or in_fused(place.parent)

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B from the module's `in_features` and `out_features`: its weight may be packed."""
        return (r, int(module.in_features)), (int(module.out_features), r)  # type: ignore[arg-type]

    @classmethod
    def anchor(cls, module: nn.Module) -> Tensor | None:
        """W0, or else the module's first tensor."""
        weight = module._parameters.get(cls.weight_name)
        held = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        return next(held, None) if weight is None else weight

    def update(self, name: str, x: Tensor) -> Tensor:  # noqa: D102
        return functional.low_rank(x, *self.update_of(name))

    def check_mergeable(self) -> None:
        """As `LoraLayer.check_mergeable`.

        Raises:
            StateError: the weight is packed, or the forward does more than multiply by it.
        """
        weight = self._parameters.get(self.weight_name)
        if weight is None or not weight.is_floating_point():
            raise StateError(
                f"a quantized {self.base_class.__name__}, packed in a way that lorica can neither read nor "
                "write; merge into the original base (`lorica merge BASE ADAPTER --output DIR`), or teach "
                "lorica the format with lorica.layers.quantized.register"
            )
        if has_own_forward(self.base_class):
            x = drawn((4, self.factor_shapes(self, 1)[0][1]), weight)
            check_multiplies(self, x, F.linear)


def in_fused(parent: nn.Module | None) -> bool:
    """Whether a module is a part of torch's own attention or encoder layer, which read the weights."""
    encoder = nn.TransformerEncoderLayer
    return isinstance(parent, nn.MultiheadAttention) or (
        isinstance(parent, encoder) and type(parent).forward is encoder.forward
    )


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether a class overrides the forward of the torch layer that it derives from."""
    known = next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn."))
    return cls.forward is not known.forward


def drawn(shape: Sequence[int], like: Tensor) -> Tensor:
    """Normal random numbers of another tensor's dtype and device; torch's own generators do not move."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return numbers.to(like.device, like.dtype)


def check_multiplies(layer: LoraLayer, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Refuse to merge into a layer whose output does not change by the update when its weight does.

    A layer that scales or normalises its product gets the update added after that while it is adapted, and
    before that once it is merged; the two would differ.

    Args:
        layer: adapted layer whose base has a forward of its own.
        x: an input for it.
        multiply: (input, weight) → their product, as torch's own layer computes it.

    Raises:
        StateError: a change of the weight does not change the output by its product with the input.
    """
    kind, weight = layer.base_class.__name__, layer.base_weight
    change = drawn(weight.shape, weight) * weight.detach().float().std().to(weight.dtype)
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
            f"{kind} does more than multiply by its weight, so a merged update would act differently; "
            "leave it out of what is merged, or use the adapter unmerged"
        )


def _opaque(found: type[LoraLayer] | None, module: nn.Module) -> type[LoraLayer] | None:
    return LoraOpaque if found is None and (isinstance(module, nn.Linear) or _is_linear(module)) else found


def _is_linear(module: nn.Module) -> bool:
    """Whether a module other than `nn.Linear` declares itself linear, and holds no other modules."""
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    declared = all(isinstance(width, int) and width > 0 for width in widths)
    return declared and not module._modules and not isinstance(module, conv1d_class())


RULES.append(_opaque)
