"""One low-rank update for two tables that are one weight (`ensure_weight_tying`).

    embedding   W0 + s·(B·A)ᵀ                    B·A (dim, vocabulary)
    head        W0 + s·Aᵀ·Bᵀ                     the same sum, by the same two parameters

So the tables are still equal after every step, and merged they are one weight again.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import Parameter

from lorica.layers.base import LoraLayer
from lorica.layers.embedding import LoraEmbedding
from lorica.layers.variants import PLAIN


class TiedFactor(nn.Module):
    """A head's factor: an embedding's, transposed.

    The embedding's parameter stands here under a name of its own, so that whoever asks the head alone for
    what trains in it (the loss by chunks) finds it.

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
    """Give a layer an adapter's factors that another table has; they train as one.

    Args:
        layer: the head, or another embedding.
        name: of the adapter.
        table: the embedding that has them.
    """
    A, B = table.factor_parameters(name)
    scale, dropout = table.scaling[name], table.lora_dropout[name]
    if isinstance(layer, LoraEmbedding):
        layer.add_factors(name, A, B, scale, dropout)
        return
    layer.lora_A[name], layer.lora_B[name] = TiedFactor(B), TiedFactor(A)
    layer.scaling[name], layer.lora_dropout[name], layer.variants[name] = scale, dropout, PLAIN


def tied_factors(layer: LoraLayer, name: str) -> dict[str, Parameter] | None:
    """Live names and parameters of a head's A and B where they are an embedding's, transposed; else None."""
    found = {}
    for side in ("lora_A", "lora_B"):
        factors = layer._modules.get(side)
        if isinstance(factors, nn.ModuleDict) and name in factors:
            factor = factors[name]
            if isinstance(factor, TiedFactor):
                found[f"{side}.{name}.transposed"] = factor.transposed
    return found or None
