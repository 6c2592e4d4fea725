"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lorica import functional
from lorica.adapter import Kind
from lorica.errors import StateError, TargetError
from lorica.layers.base import LoraLayer
from lorica.layers.kinds import KINDS
from lorica.layers.plugins.opaque import check_multiplies, drawn, has_own_forward


class LoraConv(LoraLayer):
    """A convolution.

    A convolves with the base's kernel, stride, padding and dilation down to r channels; B mixes them point by
    point.
    """

    kind: ClassVar[Kind] = "conv"
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    _reversed_padding_repeated_twice: list[int]

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A (r, channels_in, *kernel) and B (channels_out, r / groups, 1, ...)."""
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if r % module.groups:
            raise TargetError(
                f"Targeting a {type(module).__name__} with groups={module.groups} and rank {r}. Currently, "
                "support is limited to conv layers where the rank is divisible by groups. Either choose a "
                "different rank or do not target this specific layer."
            )
        kernel = tuple(module.kernel_size)
        point = (1,) * len(kernel)
        return (r, module.in_channels, *kernel), (module.out_channels, r // module.groups, *point)

    def update(self, name: str, x: Tensor) -> Tensor:
        """The update for ``(batch, channels_in, *space)``: (batch, channels_out, *space)."""
        A, B, scale, p = self.update_of(name)
        return scale * self._point(self._down(functional.dropout(x, p), A.to(x.dtype)), B.to(x.dtype))

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        if has_own_forward(self.base_class):
            return super().multiply(x, weight)
        return self._conv_forward(x, weight, None)

    def along_outputs(self, vector: Tensor) -> Tensor:  # noqa: D102
        return vector.view(-1, *(1 for _ in self.stride))

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), "valid"
        # A sees every input channel, whatever the base's groups.
        return _convolve(A)(x, A, None, self.stride, padding, self.dilation)

    def _point(self, x: Tensor, B: Tensor) -> Tensor:
        return _convolve(B)(x, B, groups=self.groups)

    def check_mergeable(self) -> None:
        """As `LoraLayer.check_mergeable`.

        Raises:
            StateError: the convolution is grouped, and its update sees all channels; or its forward does more
                than convolve.
        """
        if self.groups > 1:
            raise StateError(
                f"a convolution with {self.groups} groups cannot be merged: the update sees every "
                "input channel, its weight only a group's"
            )
        if has_own_forward(self.base_class):
            weight = self.base_weight
            field = (d * (k - 1) + 4 for d, k in zip(self.dilation, weight.shape[2:], strict=True))
            x = drawn((1, weight.shape[1], *field), weight)
            check_multiplies(self, x, lambda x, change: self._conv_forward(x, change, None))


def _convolve(kernel: Tensor) -> Callable[..., Tensor]:
    return (F.conv1d, F.conv2d, F.conv3d)[kernel.dim() - 3]


KINDS.update(dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), LoraConv))
