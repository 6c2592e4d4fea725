"""The common part of loralib's layers: their settings, and merging on `eval()`.

    train()   weight: W0                      forward: W0·x + s·B·A·dropout(x)
    eval()    weight: W0 + s·B·A, W0 aside    forward: the plain layer's

Merging replaces the parameter and sets W0's own aside, so that `train()` puts back the same object.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.errors import ConfigError
from lorica.folding import fold


class LoRALayer:
    """The settings of a layer with an update beside its weight.

    Not a module, so that a class of your own can derive from ``nn.Linear, LoRALayer``, as with loralib.

    Args:
        r: rank of the update; 0 for none.
        lora_alpha: numerator of the scale α/r.
        lora_dropout: probability in [0, 1) of dropping an input of A, in training only.
        merge_weights: whether `eval()` merges the update into the weight.

    Raises:
        ConfigError: a value is out of range.
    """

    merged: bool = False

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        if not isinstance(r, int) or r < 0:
            raise ConfigError(f"r must be a whole number of at least 0 (0 is a plain layer), not {r!r}")
        if not 0 <= lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be a probability in [0, 1), not {lora_dropout!r}")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.merged = False
        self.merge_weights = merge_weights


class MergingLayer(LoRALayer, nn.Module):
    """A layer whose update is in its weight while it evaluates."""

    lora_A: Parameter
    lora_B: Parameter
    scaling: float
    _aside: tuple[Parameter, ...] = ()
    """While merged: W0's parameter, and the merged one."""

    @property
    def has_update(self) -> bool:
        """Whether the layer has an A and a B."""
        return "lora_A" in self._parameters

    @property
    def weight_owner(self) -> nn.Module:
        """The module that holds the weight: this one, or the convolution inside it."""
        return self

    @property
    def mergeable(self) -> bool:
        """Whether `eval()` may replace the weight; not one that trains: an optimizer may hold it."""
        return self.merge_weights and self.has_update and not self._weight.requires_grad

    @property
    def _weight(self) -> Parameter:
        weight = self.weight_owner._parameters["weight"]
        assert weight is not None
        return weight

    def product(self) -> tuple[Tensor, Tensor]:
        """Matrices (n, r) and (r, m); `scaling` times their product updates ``weight.view(n, m)``."""
        return self.lora_B, self.lora_A

    def merged_weight(self) -> Tensor:
        """``W0 + s·B·A``, computed in float32 or W0's higher precision, and rounded once."""
        W0 = (self._aside[0] if self.merged else self._weight).detach()
        precision = torch.promote_types(W0.dtype, torch.float32)
        left, right = (factor.detach().to(precision) for factor in self.product())
        matrix = W0.reshape(left.shape[0], right.shape[1])
        return fold(matrix, left, right, self.scaling, out=torch.empty_like(matrix)).view(W0.shape)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; evaluation merges the update into the weight, training takes it out again."""
        super().train(mode)
        if mode:
            self._unmerge()
        elif self.mergeable:
            self._merge()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.state_dict`; the weight in it is W0, merged or not."""
        with self._unmerged():
            return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Loading replaces W0, A or B, so the merged weight is out of date; the next eval() merges anew.
        self._unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        merged = self.merged
        self._unmerge()
        super()._apply(fn, recurse)
        if merged:
            self._merge()
        return self

    def _merge(self) -> None:
        if not self.merged:
            W0, folded = self._weight, Parameter(self.merged_weight(), requires_grad=False)
            self._aside = W0, folded
            self.weight_owner._parameters["weight"] = folded
            self.merged = True

    def _unmerge(self) -> None:
        if self.merged:
            W0, folded = self._aside
            # A weight assigned while merged is the weight from now on.
            if self._weight is folded:
                W0.requires_grad = folded.requires_grad
                self.weight_owner._parameters["weight"] = W0
            self._aside, self.merged = (), False

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        """Put W0 in its place for the length of a block."""
        parameters, now = self.weight_owner._parameters, self._weight
        if self.merged and now is self._aside[1]:
            parameters["weight"] = self._aside[0]
        try:
            yield
        finally:
            parameters["weight"] = now

    def _add_update(self, shape_A: tuple[int, int], shape_B: tuple[int, int]) -> None:
        """Freeze W0 and put factors of these shapes beside it, not drawn yet."""
        self.lora_A = Parameter(self._weight.new_zeros(shape_A))
        self.lora_B = Parameter(self._weight.new_zeros(shape_B))
        self.scaling = self.lora_alpha / self.r
        self._weight.requires_grad = False

    def _reset_update(self) -> None:
        """Draw A, and set B to zero."""
        if self.has_update:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def _drop_rate(self) -> float:
        """The dropout rate in force, from the submodule: `eval()` of a model's dropouts reaches it."""
        return self.lora_dropout.p if self.lora_dropout.training else 0.0
