"""Choosing tokens: each request by its own rules, from logits that came together."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.serve.engine import Sampling, Token

log = logging.getLogger("lorica.serve")

_COLD = 1e-5
"""Below this temperature the likeliest token is taken: logits over less are no numbers any more."""


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: its rules.
        prompt: token ids, which a repetition penalty counts as well.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.plain = _is_plain(sampling)
        self._generator: torch.Generator | None = None
        self._counts: Counter[int] = Counter()
        penalized = sampling.presence_penalty or sampling.frequency_penalty
        self._counting = bool(penalized) or sampling.repetition_penalty != 1
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        if sampling.temperature >= _COLD:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63
            self._generator = torch.Generator().manual_seed(seed)

    def choose(self, logits: Tensor) -> Token:
        """The next token.

        Args:
            logits: (vocabulary,), float32, on the CPU.
        """
        chosen = self._draw(logits)
        if self._counting:
            self._counts[chosen] += 1
        return described(chosen, logits, self.sampling.logprobs)

    def _draw(self, logits: Tensor) -> int:
        own = self.sampling
        scores = self._penalized(logits)
        if own.temperature < _COLD:
            return int(scores.argmax())
        scores = (scores - scores.max()) / own.temperature  # so that none overflows
        if 0 < own.top_k < len(scores):
            least = scores.topk(own.top_k).values[-1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = scores.softmax(0)
        if own.min_p > 0:
            probabilities[probabilities < own.min_p * probabilities.max()] = 0
        if own.top_p < 1:
            ordered, index = probabilities.sort(descending=True, stable=True)
            total = ordered.sum()
            ordered[ordered.cumsum(0) - ordered >= own.top_p * total] = 0  # the likeliest stays
            probabilities = torch.zeros_like(probabilities).scatter_(0, index, ordered)
        return int(probabilities.multinomial(1, generator=self._generator))

    def _penalized(self, logits: Tensor) -> Tensor:
        own = self.sampling
        if not own.logit_bias and not self._counts and not self._seen:
            return logits
        scores = logits.clone()
        if own.repetition_penalty != 1:
            index = torch.tensor(sorted(self._seen | self._counts.keys()))
            picked = scores[index]
            penalty = own.repetition_penalty
            scores[index] = torch.where(picked > 0, picked / penalty, picked * penalty)
        if self._counts and (own.presence_penalty or own.frequency_penalty):
            index = torch.tensor(list(self._counts))
            times = torch.tensor(list(self._counts.values()), dtype=scores.dtype)
            scores[index] -= own.presence_penalty + own.frequency_penalty * times
        for token, bias in own.logit_bias:
            scores[token] += bias
        return scores


def choose_all(samplers: Sequence[Sampler], logits: Tensor) -> list[Token | None]:
    """The next token of each of some answers; None where the logits are not finite, or none can be drawn.

    Args:
        samplers: of the answers.
        logits: (answers, vocabulary), float32.
    """
    highest = logits.max(-1)  # NaN where one is among them
    plain, finite = highest.indices.tolist(), highest.values.isfinite().tolist()
    rows = logits if all(sampler.plain for sampler in samplers) else logits.cpu()
    return [
        None if not finite[i] else Token(plain[i]) if sampler.plain else _drawn(sampler, rows[i])
        for i, sampler in enumerate(samplers)
    ]


def _drawn(sampler: Sampler, logits: Tensor) -> Token | None:
    try:
        return sampler.choose(logits)
    except RuntimeError:  # of one request's rules, which is no reason to end the others
        log.exception("no token could be drawn by %s", sampler.sampling)
        return None


def described(token: int, logits: Tensor, logprobs: int | None) -> Token:
    """A token with the logarithms that were asked for.

    Args:
        token: its id.
        logits: that it was chosen from (vocabulary,).
        logprobs: as in `Sampling`.
    """
    if logprobs is None:
        return Token(token)
    logs = logits.log_softmax(-1)
    top = logs.topk(min(logprobs, len(logs)))
    likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Token(token, float(logs[token]), likeliest)


def _is_plain(sampling: Sampling) -> bool:
    """Whether the likeliest token is the answer, and nothing else is asked."""
    penalties = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
    greedy = sampling.temperature < _COLD and not penalties and not sampling.logit_bias
    return greedy and sampling.logprobs is None
