"""Layers whose weight is read past their forward, by a parent module or by a forward of their own.

    self.dt_proj.weight  ──shown as──▶  W0 + Σ scale·B·A of the acting adapters

A reader of the weight computes as with the merged weight, in training too; the layer's own forward reads W0.
Nothing is written to W0.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.errors import StateError, TargetError
from lorica.layers.base import LoraLayer
from lorica.layers.kinds import READ, RULES
from lorica.layers.linear import LoraLinear
from lorica.layers.plugins.attention import merged_weight
from lorica.layers.plugins.biased import BIASED
from lorica.layers.plugins.conv import LoraConv
from lorica.layers.plugins.embedding import LoraEmbedding
from lorica.layers.plugins.opaque import LoraOpaque, has_own_forward
from lorica.layers.plugins.reading import reading_of
from lorica.layers.saved import READERS
from lorica.tree import Place

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ReadWeight(LoraLayer):
    """A layer whose attribute `weight` is the merged weight of the acting adapters."""

    @classmethod
    def check_place(cls, place: Place) -> None:  # noqa: D102
        super().check_place(place)
        groups = getattr(place.module, "groups", 1)
        if groups > 1:
            raise TargetError(
                f"{place.path}: the weight of this convolution is read past its forward, and with {groups} "
                "groups it has no place for the update, which sees every channel; leave it out "
                "(exclude_modules)"
            )

    @property
    def weight(self) -> Tensor:
        """W0 + Σ scale·B·A of the active adapters; W0 itself stays in `base_weight`.

        Raises:
            StateError: no weight can hold the update: it differs by row, drops inputs, or has a bias.
        """
        if self.shard_of(self.weight_name) is not None:
            return self.base_weight
        rows = self.adapter_state.rows
        names = self.acting() if rows is None else [name for name in self.scaling if name in rows.names]
        what = None
        if rows is not None and names:
            what = "as one weight for all rows, so adapters on it cannot be mixed in a batch"
        elif any(self.variants[name] is BIASED for name in names):
            what = "without its bias; set lora_bias=False"
        elif self.training and torch.is_grad_enabled() and any(self.lora_dropout[name] for name in names):
            what = "and has no input of its own to drop; set lora_dropout=0"
        if what is not None:
            raise StateError(
                f"the weight of an adapted {self.base_class.__name__} {tuple(self.base_shape)} is read past "
                f"its forward, {what}, or leave the layer out (exclude_modules)"
            )
        return merged_weight(self)


class LoraReadLinear(ReadWeight, LoraLinear):
    """A linear layer that is both called and read, such as Bloom's `dense`."""

    def base_forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # noqa: D102
        return F.linear(input, *self.base())


class LoraReadConv(ReadWeight, LoraConv):
    """A convolution that is both called and read."""

    def base_forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # noqa: D102
        return self._conv_forward(input, self.base_weight, self._parameters["bias"])


class LoraReadEmbedding(ReadWeight, LoraEmbedding):
    """A table that is both looked up in and read, such as CLIP's positions."""

    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    def base_forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # noqa: D102
        rows = F.embedding(
            input,
            self.base_weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
        scale = getattr(self, "embed_scale", None)
        return (
            rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
        )


class Uncalled(ReadWeight):
    """A layer that is never called: its parent only reads its weight."""

    takes_dropout: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False
    rows_differ: ClassVar[bool] = False


class LoraUncalledLinear(Uncalled, LoraReadLinear):
    """A linear layer that is never called, such as Mamba's `dt_proj`."""


class LoraUncalledConv(Uncalled, LoraReadConv):
    """A convolution that is never called, such as the one in front of a linear attention's kernel."""


class LoraUncalledEmbedding(Uncalled, LoraReadEmbedding):
    """A table that is never looked up in, such as DETR's queries."""


class OwnForward(Uncalled):
    """A layer whose own forward does more than multiply, so an update cannot be added to its output.

    Its forward reads the merged weight instead.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call the layer's own forward, which reads the merged weight."""
        return super(LoraLayer, self).forward(*args, **kwargs)

    def check_mergeable(self) -> None:
        """Nothing to refuse: merged, the layer reads the same weight."""


class LoraOwnLinear(OwnForward, LoraLinear):
    """A linear layer that returns more than its product, such as Llama 4's router."""


class LoraOwnConv(OwnForward, LoraConv):
    """A convolution that pads its input itself, such as a causal one."""


_OWN: dict[type[LoraLayer] | None, type[LoraLayer]] = {LoraOpaque: LoraOwnLinear, LoraConv: LoraOwnConv}


def _own(found: type[LoraLayer] | None, module: nn.Module) -> type[LoraLayer] | None:
    return _OWN[found] if found in _OWN and returns_other(module) else found


_READ: dict[type[LoraLayer], tuple[type[LoraLayer], type[LoraLayer]]] = {
    LoraLinear: (LoraReadLinear, LoraUncalledLinear),
    LoraConv: (LoraReadConv, LoraUncalledConv),
    LoraEmbedding: (LoraReadEmbedding, LoraUncalledEmbedding),
}


def _by_reading(found: type[LoraLayer], module: nn.Module, parent: nn.Module) -> type[LoraLayer]:
    """The kind where the parent reads the module's weight; kinds that cannot show one stay as they are."""
    reading = reading_of(module, parent)
    if not reading.read:
        return found
    if found in _OWN and shows_weight(module):
        return _OWN[found]
    read, uncalled = _READ.get(found, (found, found))
    return read if reading.called else uncalled


RULES.append(_own)
READERS.append(lambda part, parent: reading_of(part, parent).read)
READ.update({layer: partial(_by_reading, layer) for layer in (*_READ, LoraOpaque)})


def shows_weight(module: nn.Module) -> bool:
    """Whether a layer with a forward of its own can read a merged weight."""
    weight = module._parameters.get("weight")
    # No update can be added to a packed weight.
    plain = type(weight) is nn.Parameter and weight.dtype in _FLOATS and weight.dim() > 1
    return plain and "bias" in module._parameters and has_own_forward(type(module))


def returns_other(module: nn.Module) -> bool:
    """Whether a layer with a forward of its own returns something of another shape than its product.

    The layer is tried out once per class and widths.
    """
    weight = module._parameters.get("weight")
    if weight is None or not shows_weight(module):
        return False
    key = (type(module), tuple(weight.shape), *(getattr(module, name, None) for name in _SHAPING))
    if key not in _TRIED:
        _TRIED[key] = _try_out(module, weight)
    return _TRIED[key]


_SHAPING = ("stride", "padding", "dilation", "groups", "padding_mode")
_TRIED: dict[tuple[Any, ...], bool] = {}


def _try_out(module: nn.Module, weight: Tensor) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        field = (d * (k - 1) + 4 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        x = weight.new_zeros(1, module.in_channels, *field)
        plain = module._conv_forward
    else:
        x, plain = weight.new_zeros(2, weight.shape[1]), F.linear
    training = module.training
    try:
        module.training = False
        with torch.no_grad():
            forward: Any = type(module).forward
            y = forward(module, x)
            return not isinstance(y, Tensor) or y.shape != plain(x, weight, None).shape
    except Exception:  # it needs more than the input of a plain layer
        return True
    finally:
        module.training = training
