"""An adapter with one rank and scale 1 for all layers: no reader needs to know of patterns or of rsLoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import Tensor
from torch.nn.functional import pad

from lorica.adapter import Adapter, Factors
from lorica.errors import AdapterError


def even(adapter: Adapter) -> Adapter:
    """The same update with one rank and scale 1: B takes up the scale, smaller factors get rows of zeros.

    Args:
        adapter: a LoRA adapter; what it trained whole stays as it is.

    Returns:
        The adapter, which computes the same but for the rounding of B in its dtype.

    Raises:
        AdapterError: another method's adapter, or layers whose factors cannot be padded: grouped convolutions
            and stacked experts.
    """
    lora = adapter.lora
    r = max((f.r for f in adapter.factors.values()), default=lora.r)
    config = lora.replace(r=r, lora_alpha=r, rank_pattern={}, alpha_pattern={}, use_rslora=False)
    factors = {path: _padded(path, f, r) for path, f in adapter.factors.items()}
    return dataclasses.replace(adapter, config=config, factors=factors, trained_as=None)


def _padded(path: str, f: Factors, r: int) -> Factors:
    if f.kind == "parameter" or f.groups > 1:
        what = "stacked experts" if f.kind == "parameter" else "a grouped convolution"
        raise AdapterError(
            f"{path}: the factors of {what} have no plain form of one rank and scale; merge the adapter "
            "instead (lorica merge)"
        )
    more = r - f.r
    A = pad(f.A, (0, 0) * (f.A.dim() - 1) + (0, more))
    B = pad(f.B * f.scale, (0, 0) * (f.B.dim() - 2) + (0, more))
    bias: Tensor | None = None if f.bias is None else f.bias * f.scale
    return dataclasses.replace(f, A=A, B=B, scale=1.0, bias=bias)


def unlike_plain(adapter: Adapter, kinds: Collection[str]) -> list[str]:
    """Parts of an adapter other than plain A and B on layers of some kinds, a line each."""
    problems = [f"{name}: trained whole" for name in (*adapter.extras, *adapter.added)]
    for path, f in adapter.factors.items():
        if f.kind not in kinds:
            problems.append(f"{path}: an update of another kind, {f.kind}")
        elif f.magnitude is not None or f.bias is not None:
            problems.append(f"{path}: {'DoRA' if f.magnitude is not None else 'a bias on B (lora_bias)'}")
    return problems if problems or adapter.factors else ["it has no A and B"]
