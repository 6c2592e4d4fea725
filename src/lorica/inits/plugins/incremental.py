"""Principal directions of inputs that arrive batch by batch, and ranks assigned by them: EVA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica._shapes import Float
from lorica.config import LoraConfig
from lorica.find import Target
from lorica.inits.draws import Drawn
from lorica.inits.init import register
from lorica.inits.plugins.lowrank import leading

_NITER = 4


class IncrementalSVD:
    """The leading right singular vectors of all rows so far, centred by their mean.

    It keeps k vectors for any number of rows: the vectors so far, times their singular values, stand for
    the rows they came from.

    Args:
        k: number of vectors to keep.
        random: source of the randomized decompositions' draws.

    Source: Ross et al., 2008, §3.1; Paischer et al., 2024, §3.
    """

    def __init__(self, k: int, random: torch.Generator) -> None:
        """Start without any row."""
        self.k, self._random = k, random
        self.rows = 0
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None
        self.S: Tensor | None = None
        self.Vh: Tensor | None = None
        self.settled = torch.zeros(k, device="cpu")

    def add(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Add a batch of rows.

        Args:
            x: at least k rows; a smaller batch is skipped, because it cannot determine k directions.
        """
        if len(x) < self.k:
            return
        x = x.detach().float()
        mean = x.double().mean(0)
        rows = [x - mean.float()]
        scatter = rows[0].double().square().sum(0)
        before = self.Vh
        if before is None or self.S is None or self.mean is None or self.scatter is None:
            self.mean = mean
        else:
            share = self.rows * len(x) / (self.rows + len(x))
            shift = self.mean - mean
            rows = [self.S[:, None] * before, rows[0], (share**0.5 * shift)[None].float()]
            scatter += self.scatter + share * shift.square()
            self.mean = (self.mean * self.rows + mean * len(x)) / (self.rows + len(x))
        self.scatter, self.rows = scatter, self.rows + len(x)
        found = leading(torch.cat(rows), self.k, niter=_NITER, oversampling=self.k, random=self._random)
        # A singular vector's sign means nothing; with the largest element positive it does not flip.
        signs = found.Vh.gather(1, found.Vh.abs().argmax(1, keepdim=True)).sign()
        self.S, self.Vh = found.S, found.Vh * signs
        if before is not None:
            self.settled = F.cosine_similarity(self.Vh, before).cpu()

    def explained(self) -> Tensor:
        """The share of all variance along each vector (k,)."""
        assert self.S is not None
        assert self.scatter is not None
        return (self.S.double().square() / self.scatter.sum()).cpu()


def share_ranks(
    explained: Mapping[str, Tensor], budget: int, same_inputs: Mapping[str, str]
) -> dict[str, int]:
    """Assign ranks to the layers whose inputs vary most along one more direction.

    Args:
        explained: layer → share of its inputs' variance along each direction that it may get (k,).
        budget: total of all ranks.
        same_inputs: layer → layer with the same inputs, which gets at least the same rank.

    Returns:
        Layer → rank, 0 for some.

    Source: Paischer et al., 2024, §3.2.
    """
    owners = [name for name, shares in explained.items() for _ in shares]
    best = torch.cat(list(explained.values())).argsort(descending=True)[:budget]
    ranks = dict.fromkeys(explained, 0)
    for i in best.tolist():
        ranks[owners[i]] += 1
    for name, other in same_inputs.items():
        ranks[other], ranks[name] = max(ranks[other], ranks[name]), min(ranks[other], ranks[name])
    return ranks


class Eva(Drawn):
    """The layer's principal input directions; before data was seen, the same as True."""

    reads_weight: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    def factors(  # noqa: D102
        self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if seen is None:
            return super().factors(target, config, seen, random)
        A = seen.detach().clone()
        return A, A.new_zeros(target.factor_shapes(len(A))[1])


register("eva", Eva())
