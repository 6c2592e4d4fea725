"""Samples: one pass over the base gives a token to each sequence that is being written, whoever's it is.

request ─▶ prompt read once ─┬─▶ token ─▶ token ─▶ …      each with a generator and a cache of its own
                             └─▶ token ─▶ token ─▶ …
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lorica.service.engine.base import Base, Read
from lorica.service.engine.datum import check_tokens
from lorica.service.engine.lanes import Lane, run
from lorica.service.engine.weights import Weights
from lorica.service.errors import UserError

_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How samples are drawn.

    Args:
        max_tokens: of each; None as many as the context has room for.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: among so many of the most likely; -1 or 0 for all.
        top_p: among the most likely that have this probability together.
        seed: of the first sample's generator; the next ones count up from it. None draws one.
        stop: texts or tokens that end a sample, in place of the model's own; they are part of it. None leaves
            the model's own, an empty one takes it away.
        num_samples: how many.
        prompt_logprobs: whether the prompt's own are wanted.
        topk_prompt: for each of the prompt's tokens, so many of the likeliest there.
        topk: for each of the sample's.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str | int, ...] | None = None
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt: int = 0
    topk: int = 0

    def check(self, prompt: Sequence[int], base: Base) -> None:
        """Refuse what cannot be drawn.

        Raises:
            UserError: naming the field.
        """
        if not prompt:
            raise UserError("the prompt is empty; a sample needs one token to start from")
        check_tokens("prompt", torch.tensor(prompt), base.vocabulary)
        room = base.context - len(prompt)
        if room < 0 or (self.max_tokens is not None and not 0 <= self.max_tokens <= room):
            raise UserError(
                f"a prompt of {len(prompt)} tokens and max_tokens={self.max_tokens} do not fit the context "
                f"of {base.context}"
            )
        if not 1 <= self.num_samples <= 1024:
            raise UserError(f"num_samples must be 1 to 1024, not {self.num_samples}")
        if not self.temperature >= 0:
            raise UserError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < -1:
            raise UserError(f"top_k must be -1 (all) or more, not {self.top_k}")
        for name in ("topk", "topk_prompt"):
            if not 0 <= getattr(self, name) <= min(base.vocabulary, 1024):
                raise UserError(f"{name} must be 0 to 1024, not {getattr(self, name)}")
        if base.tokenizer is None and any(isinstance(item, str) for item in self.stop or ()):
            raise UserError("texts cannot stop a sample here: the server has no tokenizer; give token ids")


@dataclass(eq=False)
class Sample:
    """One sample.

    Args:
        tokens: with the one that ended it.
        logprobs: of the model's own distribution, whatever the temperature.
        top: ids and logarithms of the likeliest at each place, where they were asked for.
        stop_reason: ``"stop"`` or ``"length"``.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    stop_reason: Literal["stop", "length"] = "length"


@dataclass(eq=False)
class Samples:
    """What a request for samples gives.

    Args:
        sequences: the samples.
        prompt_logprobs: of the prompt's tokens from the second on; None where not asked for.
        topk_prompt: likewise, ids and logarithms (tokens − 1, k).
    """

    sequences: list[Sample] = field(default_factory=list)
    prompt_logprobs: Tensor | None = None
    topk_prompt: tuple[Tensor, Tensor] | None = None


class Request:
    """A request for samples, as its lanes see it.

    Args:
        base: the model.
        prompt: token ids.
        weights: the adapter; None for the base.
        draw: how; checked.
    """

    def __init__(self, base: Base, prompt: Sequence[int], weights: Weights | None, draw: Draw) -> None:
        """Start nothing yet."""
        self.base, self.prompt, self.weights, self.draw = base, list(prompt), weights, draw
        self.samples = Samples([Sample() for _ in range(draw.num_samples)])
        seed = torch.seed() if draw.seed is None else draw.seed
        self._seeds = [(seed + i) % (1 << 63) for i in range(draw.num_samples)]
        self._fork: tuple[Any, Read, Tensor] | None = None

    def first(self) -> Lane:
        """The lane that reads the prompt, and writes the first sample."""
        return Lane(self.weights, self._begin)

    def others(self) -> list[Lane]:
        """Lanes of the other samples, once the prompt was read; each once."""
        if self._fork is None:
            return []
        cache, read, logits = self._fork
        self._fork = None
        lanes = []
        for i in range(1, self.draw.num_samples):
            own = read._replace(cache=copy.deepcopy(cache))
            lanes.append(Lane(self.weights, partial(self._write, i, own, logits)))
        return lanes

    def _begin(self, lane: Lane) -> None:
        prompt = torch.tensor(self.prompt)
        draw = self.draw
        read = self.base.read(prompt, keep=True)
        if draw.prompt_logprobs or draw.topk_prompt:
            self._score(lane, read)
        if draw.max_tokens == 0 or len(self.prompt) == self.base.context:
            return
        logits = self.base.lane_logits(lane, read, read.hidden[-1:])[0]
        if draw.num_samples > 1:
            self._fork = copy.deepcopy(read.cache), read._replace(cache=None), logits
        self._write(0, read, logits, lane)

    def _score(self, lane: Lane, read: Read) -> None:
        """Log-probabilities of the prompt itself."""
        k, found, ids, tops = self.draw.topk_prompt, [], [], []
        target = torch.tensor(self.prompt[1:])
        for at in torch.arange(len(target)).split(_BLOCK):
            logp = self.base.lane_logits(lane, read, read.hidden[at]).log_softmax(-1).cpu()
            found.append(logp.gather(1, target[at, None])[:, 0])
            if k:
                values, places = logp.topk(k)
                ids.append(places)
                tops.append(values)
        if self.draw.prompt_logprobs:
            self.samples.prompt_logprobs = torch.cat(found) if found else torch.empty(0)
        if k:
            none = torch.empty(0, k)
            self.samples.topk_prompt = (
                torch.cat(ids) if ids else none.long(),
                torch.cat(tops) if tops else none,
            )

    def _write(self, i: int, read: Read, logits: Tensor, lane: Lane) -> None:
        draw, base, sample = self.draw, self.base, self.samples.sequences[i]
        random = torch.Generator().manual_seed(self._seeds[i])
        ends = base.ends if draw.stop is None else {item for item in draw.stop if isinstance(item, int)}
        texts = [item for item in draw.stop or () if isinstance(item, str)]
        room = base.context - len(self.prompt)
        most = room if draw.max_tokens is None else min(draw.max_tokens, room)
        cache = read.cache
        while True:
            logp = logits.cpu().log_softmax(-1)
            token = choose(logits.cpu(), draw, random)
            sample.tokens.append(token)
            sample.logprobs.append(float(logp[token]))
            if draw.topk:
                values, ids = logp.topk(draw.topk)
                sample.top.append((ids.tolist(), values.tolist()))
            if token in ends or (texts and self._ended(sample.tokens, texts)):
                sample.stop_reason = "stop"
                return
            if len(sample.tokens) >= most:
                return
            lane.pause()
            if cache is None:  # a model that keeps none reads it all again
                read = base.read(torch.tensor(self.prompt + sample.tokens))
            else:
                read = base.read(torch.tensor([token]), cache, keep=True)
                cache = read.cache
            logits = base.lane_logits(lane, read, read.hidden[-1:])[0]

    def _ended(self, tokens: Sequence[int], texts: Sequence[str]) -> bool:
        # A token has at least one byte, so that this many of the last hold the longest text.
        last = tokens[-max(4 * len(text) + 4 for text in texts) :]
        text = self.base.tokenizer.decode(last)
        return any(stop in text for stop in texts)


def choose(logits: Tensor, draw: Draw, random: torch.Generator) -> int:
    """A token, of logits (vocabulary,)."""
    if draw.temperature == 0:
        return int(logits.argmax())
    scaled = logits / draw.temperature
    if 0 < draw.top_k < len(scaled):
        scaled = scaled.where(scaled >= scaled.topk(draw.top_k).values[-1], -torch.inf)
    probabilities = scaled.softmax(-1)
    if draw.top_p < 1:
        ordered, places = probabilities.sort(descending=True, stable=True)
        beyond = ordered.cumsum(0) - ordered >= draw.top_p
        probabilities = probabilities.index_fill(0, places[beyond], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=random))


def advance(base: Base, lanes: Sequence[Lane]) -> None:
    """A token for each of the lanes."""
    with base.running(backward=False):
        run(lanes)
