"""Losses as a service offers them: sums over tokens of a function of each token's log-probability.

logp = log p(target | before)        ratio = exp(logp − q), where q is what the sampler had

cross_entropy         −w·logp
importance_sampling   −ratio·A
ppo                   −min(ratio·A, clamp(ratio)·A)
cispo                 −stopgrad(clamp(ratio))·A·logp
dro                   −(A·logp − ½·β·(logp − q)²)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.errors import nearest
from lorica.service.errors import UserError

Inputs = Mapping[str, Tensor]
Settings = Mapping[str, float]


class Loss(NamedTuple):
    """A loss.

    Args:
        terms: log-probabilities, inputs of the same shape and settings → one term per token; their sum is the
            loss.
        needs: inputs that a datum must bring.
        takes: those that it may bring beside them.
        settings: name → default.
        idle: where one of these inputs is zero, the gradient is.
    """

    terms: Callable[[Tensor, Inputs, Settings], Tensor]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    settings: Mapping[str, float] = {}
    idle: tuple[str, ...] = ("weights",)


def _cross_entropy(logp: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    return -logp * inputs["weights"]


def _importance_sampling(logp: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    return -_ratio(logp, inputs) * inputs["advantages"] * inputs["weights"]


def _ppo(logp: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    ratio, advantages = _ratio(logp, inputs), inputs["advantages"]
    worse = torch.minimum(ratio * advantages, _clamped(ratio, inputs, settings) * advantages)
    return -worse * inputs["weights"]


def _cispo(logp: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    clipped = _clamped(_ratio(logp, inputs), inputs, settings).detach()
    return -clipped * logp * inputs["advantages"] * inputs["weights"]


def _dro(logp: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    away = logp - inputs["logprobs"]
    gain = logp * inputs["advantages"] - 0.5 * settings["beta"] * away.square()
    return -gain * inputs["weights"]


def _ratio(logp: Tensor, inputs: Inputs) -> Tensor:
    return (logp - inputs["logprobs"]).exp()


def _clamped(ratio: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    low, high = (inputs.get(name, ratio.new_tensor(settings[name])) for name in _CLIP)
    return torch.minimum(torch.maximum(ratio, low), high)


_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_IDLE = ("weights", "advantages")
_SAMPLED = ("target_tokens", "logprobs", "advantages")

LOSSES = {
    "cross_entropy": Loss(_cross_entropy, ("target_tokens",), ("weights",)),
    "importance_sampling": Loss(_importance_sampling, _SAMPLED, ("weights",), idle=_IDLE),
    "ppo": Loss(_ppo, _SAMPLED, ("weights", *_CLIP), _CLIP, _IDLE),
    "cispo": Loss(_cispo, _SAMPLED, ("weights", *_CLIP), _CLIP, _IDLE),
    "dro": Loss(_dro, _SAMPLED, ("weights",), {"beta": 0.05}),
}
"""Name → loss. Without `weights`, every token has weight 1."""


def loss_of(name: str, settings: Mapping[str, float] | None = None) -> tuple[Loss, dict[str, float]]:
    """A loss by its name, and its settings with defaults filled in.

    Raises:
        UserError: no such loss, or it has no such setting.
    """
    if name not in LOSSES:
        raise UserError(
            f"loss_fn={name!r} is not carried{nearest(name, LOSSES)}; there are {', '.join(LOSSES)}"
        )
    loss = LOSSES[name]
    unknown = set(settings or ()) - set(loss.settings)
    if unknown:
        raise UserError(
            f"loss_fn_config of {name!r} has no {sorted(unknown)}; it has "
            f"{sorted(loss.settings) if loss.settings else 'no settings'}"
        )
    values = {**loss.settings}
    for key, value in (settings or {}).items():
        try:
            values[key] = float(value)
        except (TypeError, ValueError):
            raise UserError(f"loss_fn_config[{key!r}] must be a number, not {value!r}") from None
    return loss, values
