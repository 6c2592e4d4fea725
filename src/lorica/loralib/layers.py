"""loralib's layers. Each is its plain counterpart where ``r=0``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica import functional
from lorica.checkpoint.fused import spread
from lorica.errors import ConfigError
from lorica.loralib.merging import LoRALayer as LoRALayer
from lorica.loralib.merging import MergingLayer


class _Dense(MergingLayer, nn.Linear):
    """The common part of `Linear` and `MergedLinear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        fan_in_fan_out: bool,
        merge_weights: bool,
        updated: int,
        parts: int,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        if r > 0 and updated:
            self._add_update((r * updated, in_features), (out_features // parts * updated, r))
        # A second time, as loralib does: so the same seed gives the same weights.
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t().contiguous()

    def reset_parameters(self) -> None:
        """Draw the weight, the bias and A anew; B is zero."""
        nn.Linear.reset_parameters(self)
        self._reset_update()

    def up(self) -> Tensor:
        """B as (d_out, rank)."""
        return self.lora_B

    def product(self) -> tuple[Tensor, Tensor]:
        """As `MergingLayer.product`."""
        A, B = self.lora_A, self.up()
        return (A.t(), B.t()) if self.fan_in_fan_out else (B, A)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the layer to ``(..., in_features)``; returns ``(..., out_features)``."""
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        if self.merged or not self.has_update:
            return F.linear(x, weight, self.bias)
        return functional.lora_linear(
            x, weight, self.bias, self.lora_A, self.up(), self.scaling, self._drop_rate()
        )


class Linear(_Dense):
    """A linear layer: ``W0·x + b + α/r · B·A·dropout(x)``.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        r: rank; 0 makes a plain layer.
        lora_alpha: numerator of the scale α/r.
        lora_dropout: probability in [0, 1) of dropping an input of A, in training.
        fan_in_fan_out: keep the weight as (in_features, out_features), as GPT-2's Conv1D has it.
        merge_weights: whether `eval()` merges.
        kwargs: `nn.Linear`'s others: bias, device, dtype.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            r,
            lora_alpha,
            lora_dropout,
            fan_in_fan_out,
            merge_weights,
            updated=1,
            parts=1,
            **kwargs,
        )


class MergedLinear(_Dense):
    """Several projections in one weight, such as q, k and v; some of them with an update of rank r each.

    A holds the updates' A, stacked, ``(r · enabled, in_features)``, and B their B,
    ``(out_features / parts · enabled, r)``. All updates see the same input after dropout.

    Args:
        in_features: size of an input.
        out_features: size of all the projections' outputs together.
        r: rank of each update; 0 makes a plain layer.
        lora_alpha: numerator of the scale α/r.
        lora_dropout: probability in [0, 1) of dropping an input of the updates, in training.
        enable_lora: whether each projection has an update.
        fan_in_fan_out: keep the weight as (in_features, out_features), as GPT-2's Conv1D has it.
        merge_weights: whether `eval()` merges.
        kwargs: `nn.Linear`'s others: bias, device, dtype.

    Raises:
        ConfigError: a value is out of range, or the projections do not divide the outputs evenly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        enabled = [bool(one) for one in enable_lora]
        if not enabled or out_features % len(enabled):
            raise ConfigError(
                f"enable_lora has {len(enabled)} parts, into which out_features={out_features} cannot be "
                "shared out evenly; give one True or False for each projection in the weight"
            )
        super().__init__(
            in_features,
            out_features,
            r,
            lora_alpha,
            lora_dropout,
            fan_in_fan_out,
            merge_weights,
            updated=sum(enabled),
            parts=len(enabled),
            **kwargs,
        )
        self.enable_lora = enabled

    def up(self) -> Tensor:
        """B as (out_features, r · enabled): each part's rows in its own columns, zeros elsewhere."""
        return spread(self.lora_B, self.enable_lora)


class Embedding(MergingLayer, nn.Embedding):
    """An embedding: the row of a token, plus ``α/r · B·A[:, token]``.

    With `max_norm`, a lookup rescales rows of the table itself, so such a table is never merged.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: size of a row.
        r: rank; 0 makes a plain layer.
        lora_alpha: numerator of the scale α/r.
        merge_weights: whether `eval()` merges.
        kwargs: `nn.Embedding`'s others. A's gradient is dense with `sparse=True` too.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        if r > 0:
            self._add_update((r, num_embeddings), (embedding_dim, r))
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:
            self._reset_update()

    def reset_parameters(self) -> None:
        """Draw the table and B anew; A is zero."""
        nn.Embedding.reset_parameters(self)
        self._reset_update()

    def _reset_update(self) -> None:
        if self.has_update:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    @property
    def mergeable(self) -> bool:  # noqa: D102
        return super().mergeable and self.max_norm is None

    def product(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.lora_A.t(), self.lora_B.t()

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Look up token ids of any shape: one dimension more."""
        rows = nn.Embedding.forward(self, x)
        if self.merged or not self.has_update:
            return rows
        A = F.embedding(x, self.lora_A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return rows + A @ self.lora_B.t() * self.scaling


class ConvLoRA(MergingLayer):
    """A convolution, in `conv`, with an update of its kernel.

    With k the kernel's size and n its dimensions, A is ``(r·k, in_channels·k)`` and B
    ``(out_channels/groups · k^(n-1), r·k)``; their product, read as the weight's shape, is the update.

    Args:
        conv_module: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: one size for every dimension.
        r: rank divided by k; 0 makes a plain layer.
        lora_alpha: numerator of the scale α/r.
        lora_dropout: probability in [0, 1) of dropping an input of the update, in training; then the update
            is a second convolution.
        merge_weights: whether `eval()` merges.
        kwargs: the convolution's others: stride, padding, groups, ...

    Raises:
        ConfigError: a value is out of range, or the kernel's sizes differ.
    """

    def __init__(
        self,
        conv_module: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d],
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)  # type: ignore[arg-type]
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            k, *others = self.conv.kernel_size
            if any(other != k for other in others):
                raise ConfigError(
                    "loralib's layout of A and B needs one kernel size for all dimensions, not "
                    f"{kernel_size}; lorica.adapt adapts any nn.Conv1d, nn.Conv2d or nn.Conv3d"
                )
            rows = out_channels // self.conv.groups * k ** len(others)
            self._add_update((r * k, in_channels * k), (rows, r * k))
        self.reset_parameters()

    @property
    def weight_owner(self) -> nn.Module:  # noqa: D102
        return self.conv

    def reset_parameters(self) -> None:
        """Draw the weight, the bias and A anew; B is zero."""
        self.conv.reset_parameters()
        self._reset_update()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(batch, in_channels, *space)``; returns ``(batch, out_channels, *space)``."""
        if self.merged or not self.has_update:
            return self.conv(x)
        W0, p = self.conv.weight, self._drop_rate()
        left, right = self.product()
        if p == 0:
            matrix = W0.reshape(left.shape[0], right.shape[1])
            folded = torch.addmm(matrix, left, right, alpha=self.scaling).view(W0.shape)
            return self.conv._conv_forward(x, folded, self.conv.bias)
        update = (left @ right).view(W0.shape) * self.scaling
        return self.conv(x) + self.conv._conv_forward(functional.dropout(x, p), update, None)


class Conv1d(ConvLoRA):
    """`nn.Conv1d` with an update; arguments as `ConvLoRA`'s after the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """`nn.Conv2d` with an update; arguments as `ConvLoRA`'s after the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """`nn.Conv3d` with an update; arguments as `ConvLoRA`'s after the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
