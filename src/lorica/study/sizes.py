"""The size of the updates beside the weights, and their loss in a merge in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lorica.adapter import Adapter, Factors
from lorica.errors import ConfigError
from lorica.folding import fold, one_thread
from lorica.study.directions import singular_values
from lorica.study.modules import Weight, base_weights
from lorica.study.results import Result


@dataclass(frozen=True, eq=False)
class Norms(Result):
    """One layer's Frobenius norms.

    Args:
        A: ‖A‖.
        B: ‖B‖.
        update: ‖scale·B·A‖.
        weight: ‖W0‖; None if no base was given.
        relative: update / weight.
    """

    A: float
    B: float
    update: float
    weight: float | None = None
    relative: float | None = None


@dataclass(frozen=True, eq=False)
class NormReport(Result):
    """Norms of every layer.

    Args:
        layers: module path → its norms.
    """

    layers: dict[str, Norms]


@dataclass(frozen=True, eq=False)
class Drift(Result):
    """The loss of storing one merged weight.

    Args:
        lost: ‖stored − (W0 + ΔW)‖ / ‖ΔW‖: the share of the update that rounding took away or added. 0 is
            exact; at 1 the error is as large as the update.
        moved: share of the weight's elements that the merge changes.
    """

    lost: float
    moved: float


@dataclass(frozen=True, eq=False)
class DriftReport(Result):
    """The loss of every layer in a merge.

    Args:
        dtype: dtype of the stored weights.
        layers: module path → its loss.
    """

    dtype: torch.dtype
    layers: dict[str, Drift]


def norms(adapter: Adapter, base: str | Path | None = None) -> NormReport:
    """Norms of the factors and updates, and of the weights if there is a base.

    Args:
        adapter: the updates.
        base: folder, file of safetensors or Hub name of the base; its weights are read one at a time.

    Raises:
        AdapterError: the base does not fit the adapter.
        FileError: the base cannot be read.
    """
    if base is None:
        return NormReport({path: normed(f) for path, f in Adapter.check(adapter).factors.items()})
    return NormReport({w.path: normed(w.factors, w) for w in base_weights(adapter, base)})


def normed(factors: Factors, weight: Weight | None = None) -> Norms:
    """One layer's norms."""
    A, B = (float(torch.linalg.norm(f.detach().double())) for f in (factors.A, factors.B))
    update = float(torch.linalg.norm(singular_values(factors)))
    if weight is None:
        return Norms(A, B, update)
    size = float(torch.linalg.norm(weight.W))
    return Norms(A, B, update, size, update / size if size else None)


def drift(adapter: Adapter, base: str | Path, dtype: torch.dtype = torch.bfloat16) -> DriftReport:
    """The loss of each update in a merge that is stored in few bits.

    The sum is float32 and rounded once, as in `lorica.merge`.

    Args:
        adapter: the updates.
        base: folder, file of safetensors or Hub name of the base; its weights are read one at a time.
        dtype: dtype of the stored weights.

    Raises:
        AdapterError: the base does not fit the adapter.
        ConfigError: the dtype is not one of floating-point numbers.
        FileError: the base cannot be read.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype must be one that weights are stored in, not {dtype}")
    return DriftReport(dtype, {w.path: drifted(w, dtype) for w in base_weights(adapter, base)})


def drifted(weight: Weight, dtype: torch.dtype) -> Drift:
    """One layer's loss; the update is formed here, because the sum is rounded."""
    f = weight.factors
    W, B, A = weight.W, f.B.detach().flatten(1).float(), f.A.detach().flatten(1).float()
    with one_thread():
        exact = fold(W, B, A, f.scale)
    stored = exact.to(dtype)
    size = torch.linalg.norm(singular_values(f))
    lost = torch.linalg.norm(stored.float() - exact)
    return Drift(float(lost / size) if size else 0.0, float((stored != W.to(dtype)).float().mean()))
