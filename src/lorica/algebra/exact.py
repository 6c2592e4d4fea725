"""The exact operations on adapters: sums, differences and multiples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lorica.adapter import Adapter, Factors
from lorica.algebra.settings import tied
from lorica.algebra.spectrum import Term, blocks_of_sum, from_blocks
from lorica.algebra.terms import Terms
from lorica.config.checks import is_number
from lorica.errors import ConfigError


def concatenate(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, *, keep: int | None = None
) -> Adapter:
    """The exact weighted sum ``Σ weight·scale·B·A``: all B side by side, all A stacked.

        w₁·s₁·B₁·A₁ + w₂·s₂·B₂·A₂  =  [w₁·s₁·B₁  w₂·s₂·B₂] · [A₁; A₂]

    Exact up to rounding, whatever the ranks, scales and targets. Ranks add up; `compress` lowers them again.
    A layer that an adapter lacks counts as zero.

    Args:
        adapters: at least one, for one base.
        weights: a number per adapter, of either sign; None takes 1 for each.
        keep: index of the adapter whose head, biases and task the result has, for these do not add up; None
            if no two adapters differ in them.

    Returns:
        The sum, in float32 or the higher precision of a term. Its scale is 1 throughout (``lora_alpha`` =
        r, no `use_rslora`), with patterns for layers of another rank, so PEFT reads its files alike.

    Raises:
        AdapterError: kinds or shapes of layers differ, an adapter has magnitudes (DoRA), or heads, biases or
            tasks differ and `keep` is None.
        ConfigError: there are not as many finite weights as adapters, or `keep` is no index.

    Warns:
        LoricaWarning: the adapters name different bases.
    """
    return Terms.of(adapters, weights).join(side_by_side, keep)


def add(*adapters: Adapter, keep: int | None = None) -> Adapter:
    """The sum of adapters, exactly; `concatenate` with weights of 1.

    A model with all of them active computes the same.
    """
    return concatenate(adapters, keep=keep)


def subtract(adapter: Adapter, other: Adapter, *, keep: int | None = None) -> Adapter:
    """One adapter less another, exactly; `concatenate` with weights of 1 and −1.

    Source: Ilharco et al., 2022, "Editing Models with Task Arithmetic", for whole models.
    """
    return concatenate([adapter, other], [1.0, -1.0], keep=keep)


def scale(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with its updates multiplied, exactly: by `lora_alpha`, so no tensor changes.

    Heads and biases stay as they are.

    Args:
        adapter: any but DoRA's.
        factor: of either sign. The sign goes into B, since α is positive; 0 makes B zero.

    Returns:
        The scaled adapter; it shares memory with the given one where it can.

    Raises:
        AdapterError: the adapter has magnitudes (DoRA), so a multiple of its update has another effect.
        ConfigError: the factor is not finite.
    """
    if not is_number(factor):
        raise ConfigError(f"factor must be a finite number, not {factor!r:.80}")
    Terms.of([adapter]).check_magnitudes()
    size = abs(factor) or 1.0
    sign = math.copysign(1.0, factor) if factor else 0.0
    config = adapter.lora.replace(
        lora_alpha=adapter.lora.lora_alpha * size,
        alpha_pattern={name: alpha * size for name, alpha in adapter.lora.alpha_pattern.items()},
    )
    factors = {
        path: dataclasses.replace(
            f,
            B=f.B if sign == 1 else f.B * sign,
            bias=f.bias if f.bias is None or sign == 1 else f.bias * sign,
            scale=f.scale * size,
        )
        for path, f in adapter.factors.items()
    }
    return dataclasses.replace(
        adapter, config=config, factors=tied(config, factors, [adapter]), trained_as=None
    )


def side_by_side(path: str, updates: Sequence[Term], like: Factors) -> Factors:
    """The weighted sum of updates; its rank is the sum of theirs."""
    return from_blocks(*blocks_of_sum(updates, like.A.dtype), like)
