"""DoRA as plain LoRA of a higher rank: no other of that rank is nearer to what DoRA does to the weight.

    m / ‖W0 + s·B·A‖ ∘ (W0 + s·B·A)  −  W0  =  U·S·Vh  ≈  B'·A'        the largest singular values alone

Scaling the rows of W0 is of full rank, so that a low rank leaves an error; it is measured layer by layer.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lorica.adapter import Adapter
from lorica.algebra import ErrorReport, LayerError
from lorica.algebra.settings import describing
from lorica.algebra.spectrum import Spectrum
from lorica.errors import AdapterError, ConfigError, TargetError
from lorica.layers import LoraLayer
from lorica.model import delta_weight, extract


def without_dora(model: nn.Module, name: str | None = None, *, rank: int) -> tuple[Adapter, ErrorReport]:
    """A DoRA adapter as a plain one, each of whose updates is the nearest of a rank.

    Args:
        model: adapted by it; stays as it is. Its weights are read.
        name: the adapter's, or None for the one that there is.
        rank: of each update, at least 1; a smaller layer has no more than its width.

    Returns:
        The plain adapter, its scale 1; and each layer's relative error ‖Δ' − Δ‖ / ‖Δ‖, where Δ is what DoRA
        adds to the weight.

    Raises:
        ConfigError: the rank is less than 1.
        AdapterError: it is no DoRA.

    Source: Eckart and Young, 1936; Liu et al., 2024, "DoRA", equation 5.
    """
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")
    adapter = extract(model, name)
    if not any(f.magnitude is not None for f in adapter.factors.values()):
        raise AdapterError("this adapter has no magnitudes of DoRA: it is plain LoRA already")
    factors, errors = dict(adapter.factors), {}
    for path, f in adapter.factors.items():
        if f.magnitude is None:
            continue
        layer = model.get_submodule(path)
        if not isinstance(layer, LoraLayer):
            raise TargetError(f"{path} is no adapted layer")
        delta = layer.as_matrix(delta_weight(model, path, name)).double()
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        kept = Spectrum(U[None], S[None], Vh[None]).cut(min(rank, len(S)))
        made = factors[path] = dataclasses.replace(kept.factors(f), magnitude=None)
        B, A = (block[0].double() for block in made.blocks())
        size = float(S.norm())
        off = float(torch.linalg.norm(B @ A - delta))
        errors[path] = LayerError(off / size if size else 0.0, size, made.r)
    config = describing(adapter.lora, factors).replace(use_dora=False)
    return dataclasses.replace(adapter, config=config, factors=factors, trained_as=None), ErrorReport(errors)
