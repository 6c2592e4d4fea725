"""Linear layers: torch's own, transformers' Conv1D, and those whose weight is read without calling them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica import functional
from lorica.choice import traced
from lorica.layers.base import LoraLayer
from lorica.layers.rows import Blocks, Rows, Stack
from lorica.layers.variants import BIASED, DORA, PLAIN


class LoraLinear(LoraLayer):
    """A linear layer: ``W0·x + b + Σ scale·B·A·dropout(x)``."""

    bias: Tensor | None

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """W0 as (d_out, d_in), and the bias."""
        try:
            bias = self._parameters["bias"]
        except KeyError:
            bias = self.computed("bias")
        return self.as_matrix(self.base_weight), bias

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(..., d_in)``; returns ``(..., d_out)``."""
        names = self.acting()
        rows = self.adapter_state.rows
        if rows is not None:
            if torch.is_grad_enabled():
                rows.forget()
                return super().forward(input)
            dropping = self.training and any(self.lora_dropout.values())
            if dropping or rows.asked(self, self.is_more_than_factors):
                return super().forward(input)
            y = F.linear(input, *self._base())
            return rows.add_stacked_(y, input, self, self.scaling.keys(), partial(self._stack, y.dtype))
        if len(names) != 1:
            return super().forward(input) if names else self.base_forward(input)
        A, B, scale, p = self.update_of(names[0])
        variant = self.variants[names[0]]
        weight, bias = self._base()
        if variant is not PLAIN:
            if variant is DORA and self.weight_beside(names[0]) is None:
                y = functional.lora_linear(input, weight, bias, A, B, scale, p)
                return DORA.rescaled(y, DORA.ratio(self, names[0]), bias)
            if variant is not BIASED:
                return super().forward(input)
            shift = BIASED.shift(self, names[0])
            bias = shift.to(weight.dtype) if bias is None else bias + shift.to(bias.dtype)
        return functional.lora_linear(input, weight, bias, A, B, scale, p)

    def base_forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``W0·x + b``, whatever the attribute `weight` shows."""
        return F.linear(input, *self._base())

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x, self.as_matrix(weight))

    def is_more_than_factors(self) -> bool:
        """Whether an adapter does more than add its product."""
        return not {PLAIN}.issuperset(self.variants.values())

    def update(self, name: str, x: Tensor) -> Tensor:  # noqa: D102
        return functional.low_rank(x, *self.update_of(name))

    def _stack(self, dtype: torch.dtype, names: Sequence[str], mixture: Rows, gaps: float) -> list[Stack]:
        """The adapters' A (adapters, r, d_in) and B (adapters, d_out, r), in `dtype`, with their scales."""
        taken, scaling = None, self.scaling
        scales = {scaling[name] for name in names}
        if not traced() and not any(map(functional.needs_evening, scales)):
            As, Bs = self._modules["lora_A"]._modules, self._modules["lora_B"]._modules  # type: ignore[union-attr]
            blocks = self.blocks
            if blocks is None:
                blocks = self.__dict__["blocks"] = Blocks()
            taken = blocks.take(As, Bs, names, mixture, gaps)
        if taken is None:
            return [self._stacked_anew(dtype, names)]
        stacks = []
        for own, A, B in taken:
            acting = scales if len(scales) == 1 else {scaling[name] for name in own if name}
            scale: float | Tensor = next(iter(acting))
            if len(acting) > 1:
                scale = torch.tensor([scaling[name] if name else 1.0 for name in own], dtype=dtype).view(
                    -1, 1, 1
                )
            stacks.append(Stack(own, A.to(dtype), B.to(dtype), scale))
        return stacks

    def _stacked_anew(self, dtype: torch.dtype, names: Sequence[str]) -> Stack:
        """The same of factors that stay where they are, filled up with zeros to one rank."""
        As, Bs, scales, _ = zip(*(self.update_of(name) for name in names), strict=True)
        r = max(A.shape[0] for A in As)
        A = torch.stack([A if A.shape[0] == r else F.pad(A, (0, 0, 0, r - A.shape[0])) for A in As])
        B = torch.stack([B if B.shape[1] == r else F.pad(B, (0, r - B.shape[1])) for B in Bs])
        scale = torch.tensor(scales, dtype=dtype, device=A.device).view(-1, 1, 1)
        return Stack(names, A.to(dtype), B.to(dtype), scale)


class LoraConv1D(LoraLinear):
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored (d_in, d_out)."""

    transposed: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `LoraLinear.forward`; transformers calls the input x."""
        return super().forward(x)


class LoraReadLinear(LoraLinear):
    """A linear layer whose weight others read, past its forward.

    It is `linear1` or `linear2` of an `nn.TransformerEncoderLayer`. In evaluation that layer hands the raw
    weights to one fused kernel. So `weight` shows W0 with the active updates folded in, and the kernel
    computes what `forward` would.
    """

    rows_differ: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False

    @property
    def weight(self) -> Tensor:
        """W0 + Σ scale·B·A of the active adapters; W0 itself stays in `base_weight`."""
        return self.merged_weight()


class LoraAttentionOutput(LoraReadLinear):
    """`out_proj` of `nn.MultiheadAttention`, which is never called: its weight is always read."""

    takes_dropout: ClassVar[bool] = False


class LoraAttention(LoraLayer):
    """`nn.MultiheadAttention`: the update of its fused query, key and value projection.

    The attention reads `in_proj_weight` in training, in evaluation and on its fused path alike; showing it W0
    with the update folded in makes each of them right, once, and W0 is never written to. Its output
    projection is a layer of its own, `LoraAttentionOutput`.
    """

    weight_name: ClassVar[str] = "in_proj_weight"
    takes_dropout: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False
    rows_differ: ClassVar[bool] = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention as it is: it reads the weight below."""
        return super(LoraLayer, self).forward(*args, **kwargs)

    @property
    def in_proj_weight(self) -> Tensor:
        """W0 + Σ scale·B·A of the active adapters; W0 itself stays in `base_weight`."""
        return self.merged_weight()
