"""W0 decomposed along the directions of its inputs: CorDA."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lorica._shapes import Float
from lorica.config import LoraConfig
from lorica.errors import AdapterError
from lorica.find import Target
from lorica.inits.init import Init, register
from lorica.inits.plugins.lowrank import Triple
from lorica.inits.plugins.seen import check_seen

_TOLERATED = 0.05  # ‖C·C⁻¹ − 1‖ up to which an inverse counts as one
_DOUBLINGS = 24  # of the term added to the diagonal, which outweighs the rest long before


class Covariance:
    """``Σ XᵀX`` of a layer's inputs, averaged over the batches it was shown.

    Each batch is first divided by its largest element, so that no batch outweighs the others.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Start at zero; sums are kept in `dtype`."""
        self.dtype, self.batches = dtype, 0
        self.total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add a batch of inputs, (..., d_in).

        Raises:
            AdapterError: the batch holds NaN or infinity, or only zeros; or the sum overflows its dtype.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.dtype)
        rows = rows / rows.max().abs()
        product = rows.t() @ rows
        if not torch.isfinite(product).all():
            raise AdapterError("its inputs have no finite covariance: they hold NaN, infinity or only zeros")
        self.total = product if self.total is None else self.total.add_(product)
        if not torch.isfinite(self.total).all():
            raise AdapterError(
                f"the covariance of its inputs outgrew {self.dtype} at batch {self.batches + 1}; take fewer "
                "or smaller batches, or leave out use_float16_for_covariance"
            )
        self.batches += 1

    def mean(self) -> Tensor:
        """The average (d_in, d_in).

        Raises:
            AdapterError: there was no batch.
        """
        if self.total is None:
            raise AdapterError("it was never called while the inputs were looked at")
        return self.total / self.batches


class Oriented(NamedTuple):
    """The part of W0 to train, ``U·diag(S)·V``: U (d_out, r), S (r,), V (r, d_in)."""

    U: Tensor
    S: Tensor
    V: Tensor

    def factors(self, scale: float) -> tuple[Tensor, Tensor]:
        """A and B with ``scale · B·A`` this part of W0."""
        return Triple(self.U, self.S, self.V).halves(scale)


def orient(
    weight: Float[Tensor, "d_out d_in"],
    covariance: Float[Tensor, "d_in d_in"],
    r: int,
    method: Literal["ipm", "kpm"] = "ipm",
) -> Oriented:
    """Decompose ``W0·C = U·S·Vᵀ`` and undo C: ``W0 = Σ Uᵢ·Sᵢ·(VᵢᵀC⁻¹)``; take r of the terms.

    Args:
        weight: W0, in float32 or better.
        covariance: C of the layer's inputs. Its diagonal is raised until C can be inverted.
        r: rank.
        method: ``"ipm"`` takes the r largest terms, which the inputs use most; ``"kpm"`` the r smallest.

    Returns:
        The terms.

    Raises:
        AdapterError: C has no inverse, however much its diagonal is raised.

    Source: Yang et al., 2024, §3.2.
    """
    mean = covariance.diagonal().mean()
    one = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for doublings in range(_DOUBLINGS):
        C = covariance + 0.01 * 2**doublings * mean * one
        inverse = torch.linalg.inv_ex(C).inverse
        if torch.dist(C @ inverse, one) < _TOLERATED:
            break
    else:
        raise AdapterError(
            "the covariance of its inputs has no inverse: it holds NaN, infinity or only zeros"
        )
    U, S, Vh = torch.linalg.svd(weight @ C, full_matrices=False)
    part = slice(None, r) if method == "ipm" else slice(len(S) - r, None)
    return Oriented(U[:, part], S[part], Vh[part] @ inverse)


class Corda(Init):
    """The part of W0 that its inputs use most, or least."""

    residual: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    def factors(  # noqa: D102
        self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        oriented = check_seen(seen, Oriented, 1, target, config, "lorica.peft.preprocess_corda")
        return oriented.factors(config.scale(target.path))


register("corda", Corda())
