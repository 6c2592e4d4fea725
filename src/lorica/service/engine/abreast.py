"""The number of sequences of one length that a call of the model can take, with the bits of each alone.

A model's own operations between its linear layers treat every sequence by itself, but for how they are cut:

    a CPU computes 2 vectors at a time and what is left one by one, which rounds otherwise;
    from 32,768 numbers on it cuts a tensor in one piece per thread.

So the numbers of a sequence must fill pairs of vectors, in every piece. To have that, a sequence is filled up
to a multiple of 8 tokens, whatever its company: a causal model does not look ahead. The module `proof` asks
the model whether all of this holds for it; until then every sequence goes by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from lorica.service.engine.targets import is_linear

MOST = 64
"""Sequences that go abreast at most."""
FILL = 8
"""Tokens of a sequence are a multiple of this, or of a larger power of two that the model's widths want."""
_GRAIN = 32768  # numbers from which torch gives a second thread something to do
_VECTORS = 128  # bytes


@dataclass
class Abreast:
    """The limits that a model's shapes set.

    Args:
        common: divides every width of the model.
        widest: numbers of one token at the widest place.
        itemsize: bytes of a number.
        context: the longest sequence.
        on_cpu: elsewhere the same bits are not promised.
        proven: whether the model was asked, and agrees.
    """

    common: int
    widest: int
    itemsize: int
    context: int
    on_cpu: bool
    proven: bool = False

    @classmethod
    def of(cls, model: nn.Module, head: nn.Module | None, context: int) -> Abreast:
        """Of a causal model and its output head."""
        layers = [module for module in model.modules() if is_linear(module) and module is not head]
        widths = {width for layer in layers for width in layer.weight.shape} or {1}  # type: ignore[union-attr]
        weight = next(model.parameters())
        return cls(math.gcd(*widths), max(widths), weight.itemsize, context, weight.device.type == "cpu")

    @property
    def fill(self) -> int:
        """Tokens of a sequence are a multiple of this."""
        return max(FILL, self._block // math.gcd(self._block, self.common))

    @property
    def _block(self) -> int:
        """Numbers of a sequence are a multiple of this."""
        return _VECTORS // self.itemsize * min(2, torch.get_num_threads())

    def filled(self, tokens: int) -> int:
        """To how many tokens a sequence of so many is filled up."""
        return min(-(-tokens // self.fill) * self.fill, self.context) if self.proven else tokens

    def most(self, tokens: int) -> int:
        """The number of sequences of so many tokens that may go abreast."""
        if not self.proven:
            return 1
        if not self.on_cpu:
            return MOST
        numbers = tokens * self.common
        if numbers % (_VECTORS // self.itemsize):
            return 1
        if torch.get_num_threads() <= 2 and numbers % self._block == 0:
            return MOST
        return min(MOST, max(1, (_GRAIN - 1) // (tokens * self.widest)))
