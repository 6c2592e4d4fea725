"""One low-rank update for two tables that are one weight (`ensure_weight_tying`).

    embedding   W0 + s·(B·A)ᵀ                    B·A (dim, vocabulary)
    head        W0 + s·Aᵀ·Bᵀ                     the same sum, by the same two parameters

So the tables stay equal after every step, and merged they are one weight again.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import Parameter

from lorica.layers.base import LoraLayer
from lorica.layers.plugins.embedding import LoraEmbedding
from lorica.layers.variants import PLAIN


class TiedFactor(nn.Module):
    """A head's factor: an embedding's factor, transposed.

    The embedding's parameter is registered here under another name, so that code which asks only the head for
    its trained parameters (the chunked loss) finds it.

    Args:
        factor: the embedding's parameter.
    """

    bias: None = None
    transposed: Parameter

    def __init__(self, factor: Parameter) -> None:
        super().__init__()
        self.transposed = factor

    @property
    def weight(self) -> Tensor:
        """The factor as the head multiplies by it; differentiable."""
        return self.transposed.t()


def tie_factors(layer: LoraLayer, name: str, table: LoraEmbedding) -> None:
    """Give a layer the adapter's factors of another table; they train as one.

    Args:
        layer: the head, or another embedding.
        name: the adapter's name.
        table: the embedding with the factors.
    """
    A, B = table.factor_parameters(name)
    scale, dropout = table.scaling[name], table.lora_dropout[name]
    if isinstance(layer, LoraEmbedding):
        layer.add_factors(name, A, B, scale, dropout)
        return
    layer.lora_A[name], layer.lora_B[name] = TiedFactor(B), TiedFactor(A)
    layer.scaling[name], layer.lora_dropout[name], layer.variants[name] = scale, dropout, PLAIN


def tied_factors(layer: LoraLayer, name: str) -> dict[str, Parameter] | None:
    """Live names and parameters of a head's A and B if they are an embedding's, transposed; else None."""
    found = {}
    for side in ("lora_A", "lora_B"):
        factors = layer._modules.get(side)
        if isinstance(factors, nn.ModuleDict) and name in factors:
            factor = factors[name]
            if isinstance(factor, TiedFactor):
                found[f"{side}.{name}.transposed"] = factor.transposed
    return found or None
