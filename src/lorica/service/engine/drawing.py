"""Samples: one pass over the base gives a token to each sequence that is being written, of any tenant.

requests whose prompts have one length ─▶ a writer ─┬─▶ sample ─▶ token ─▶ token ─▶ …
                                                    ├─▶ sample ─▶ token ─▶ token ─▶ …    abreast; each has
                                                    └─▶ sample ─▶ token ─▶ token ─▶ …    its own generator
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lorica.service.engine.base import Base, Read
from lorica.service.engine.datum import check_tokens
from lorica.service.engine.lanes import Lane, run
from lorica.service.engine.weights import Weights
from lorica.service.errors import UserError

_BLOCK = 256
MOST_SAMPLES = 1024
"""Samples of one request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Settings by which samples are drawn.

    Args:
        max_tokens: of each; None as many as the context has room for.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: among so many of the most likely; -1 or 0 for all.
        top_p: among the most likely that have this probability together.
        seed: of the first sample's generator; the next ones count up from it. None draws one.
        stop: texts or tokens that end a sample, in place of the model's own; they are part of it. None leaves
            the model's own, an empty one takes it away.
        num_samples: number of samples.
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
        """Refuse settings that cannot be drawn by.

        Raises:
            UserError: naming the field.
        """
        for name in ("max_tokens", "top_k", "seed", "num_samples", "topk_prompt", "topk"):
            if not isinstance(getattr(self, name), int | None):
                raise UserError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), int | float):
                raise UserError(f"{name} must be a number, not {getattr(self, name)!r}")
        if not prompt:
            raise UserError("the prompt is empty; a sample needs one token to start from")
        if any(not 0 <= token < 1 << 31 for token in (min(prompt), max(prompt))):
            raise UserError("the prompt holds a number that is no token id")
        check_tokens("prompt", torch.tensor(prompt), base.vocabulary)
        if self.seed is not None and not -(1 << 62) <= self.seed < 1 << 62:
            raise UserError(f"seed must be a whole number of 62 bits, not {self.seed}")
        room = base.context - len(prompt)
        if room < 0 or (self.max_tokens is not None and not 0 <= self.max_tokens <= room):
            raise UserError(
                f"a prompt of {len(prompt)} tokens and max_tokens={self.max_tokens} do not fit the context "
                f"of {base.context}"
            )
        if not 1 <= self.num_samples <= MOST_SAMPLES:
            raise UserError(f"num_samples must be 1 to {MOST_SAMPLES}, not {self.num_samples}")
        if not self.temperature >= 0:
            raise UserError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < -1:
            raise UserError(f"top_k must be -1 (all) or more, not {self.top_k}")
        for name in ("topk", "topk_prompt"):
            if not 0 <= getattr(self, name) <= min(base.vocabulary, 1024):
                raise UserError(f"{name} must be 0 to 1024, not {getattr(self, name)}")
        if not all(isinstance(item, str | int) for item in self.stop or ()):
            raise UserError(f"stop must be texts or token ids, not {self.stop!r}")
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
    """The result of a request for samples.

    Args:
        sequences: the samples.
        prompt_logprobs: of the prompt's tokens from the second on; None where not asked for.
        topk_prompt: likewise, ids and logarithms (tokens − 1, k).
    """

    sequences: list[Sample] = field(default_factory=list)
    prompt_logprobs: Tensor | None = None
    topk_prompt: tuple[Tensor, Tensor] | None = None


@dataclass(eq=False)
class Request:
    """A request for samples.

    Args:
        base: the model.
        prompt: token ids.
        draw: how; checked.
        tenant: who pays for the tokens.
        weights_of: gives the adapter when its turn comes; None for the base.

    Attributes:
        weights: the adapter, once its turn has come.
        seed: of the first sample.
        samples: what was drawn so far.
        left: samples that are not finished.
    """

    base: Base
    prompt: list[int]
    draw: Draw
    tenant: str = ""
    weights_of: Callable[[], Weights | None] = lambda: None
    future: Future[Samples] = field(default_factory=Future)
    weights: Weights | None = None

    def __post_init__(self) -> None:
        self.seed = torch.seed() if self.draw.seed is None else self.draw.seed
        self._seeds = [(self.seed + i) % (1 << 63) for i in range(self.draw.num_samples)]
        self.begin()

    def takes_turn(self) -> bool:
        """Take its adapter, now that its turn has come; False where it was given up, or has none."""
        if not self.future.set_running_or_notify_cancel():
            return False
        try:
            self.weights = self.weights_of()
        except Exception as error:
            self.future.set_exception(error)
            return False
        return True

    def begin(self) -> None:
        """Forget what was drawn so far."""
        self.samples = Samples([Sample() for _ in self._seeds])
        self.left = len(self._seeds)

    @property
    def room(self) -> int:
        """Tokens that a sample may have."""
        room = self.base.context - len(self.prompt)
        return room if self.draw.max_tokens is None else min(self.draw.max_tokens, room)

    @property
    def scores(self) -> bool:
        """Whether something is wanted of the prompt itself."""
        return self.draw.prompt_logprobs or self.draw.topk_prompt > 0

    def rows(self) -> list[Row]:
        """Its samples, to be written."""
        draw, base = self.draw, self.base
        ends = base.ends if draw.stop is None else {item for item in draw.stop if isinstance(item, int)}
        texts = [item for item in draw.stop or () if isinstance(item, str)]
        return [
            Row(self, sample, torch.Generator().manual_seed(seed), ends, texts)
            for sample, seed in zip(self.samples.sequences, self._seeds, strict=True)
        ]


@dataclass(eq=False)
class Row:
    """A sample that is written."""

    request: Request
    sample: Sample
    random: torch.Generator
    ends: Collection[int]
    texts: Sequence[str]

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for it: not where its request was begun anew, or given up."""
        request = self.request
        return not request.future.done() and any(self.sample is each for each in request.samples.sequences)

    def take(self, token: int, logprob: float) -> bool:
        """One more token; whether it is the last."""
        sample = self.sample
        sample.tokens.append(token)
        sample.logprobs.append(logprob)
        if token in self.ends or (self.texts and self._ended()):
            sample.stop_reason = "stop"
            return True
        return len(sample.tokens) >= self.request.room

    def _ended(self) -> bool:
        # A token has at least one byte, so that this many of the last hold the longest text.
        last = self.sample.tokens[-max(4 * len(text) + 4 for text in self.texts) :]
        text = self.request.base.tokenizer.decode(last)
        return any(stop in text for stop in self.texts)


class Writer(Lane):
    """A lane of samples that have one length.

    Args:
        base: the model.
        requests: whose prompts have one length; several only where they may go abreast.
        rows: samples that others read the prompts of; None reads them.
        read: then, what was read last.
        logits: then, of the next token (rows, vocabulary).
    """

    def __init__(
        self,
        base: Base,
        requests: Sequence[Request],
        rows: Sequence[Row] | None = None,
        read: Read | None = None,
        logits: Tensor | None = None,
    ) -> None:
        """Start nothing yet."""
        self.base, self.requests = base, list(requests)
        self.rows: list[Row] = list(rows or ())
        self._others: list[Writer] = []
        if rows is None:
            super().__init__([request.weights for request in requests], Writer._begin)
        else:
            super().__init__([row.request.weights for row in rows], lambda lane: lane._write(read, logits))

    @property
    def asked(self) -> list[Request]:
        """The requests whose samples it writes that somebody waits for; each once."""
        asked = dict.fromkeys([*self.requests, *(row.request for row in self.rows)])
        return [request for request in asked if not request.future.done()]

    def taken(self) -> list[Writer]:
        """Writers of samples for which it has no room, once it has read the prompts; each once."""
        others, self._others = self._others, []
        return others

    def _begin(self) -> None:
        read = self.base.read(torch.tensor([request.prompt for request in self.requests]), keep=True)
        if self.requests[0].scores:
            self._score(read)
        logits = self.base.lane_logits(self, read, read.hidden[:, -1])
        rows: list[Row] = []
        source: list[int] = []
        for i, request in enumerate(self.requests):
            if request.room == 0:
                request.left = 0
                continue
            rows += request.rows()
            source += [i] * request.draw.num_samples
        most = self.base.abreast.most(1) if hasattr(read.cache, "batch_select_indices") else 1
        for first in range(len(rows) - 1 - (len(rows) - 1) % most, -1, -most):
            some, of = rows[first : first + most], source[first : first + most]
            own = read._replace(
                cache=_chosen(copy.deepcopy(read.cache) if first else read.cache, of, len(self.requests))
            )
            if first:
                self._others.append(Writer(self.base, self.requests, some, own, logits[of]))
            else:
                self.rows = some
                self.hold([row.request.weights for row in some])
                self._write(own, logits[of])

    def _score(self, read: Read) -> None:
        """Log-probabilities of the prompts themselves."""
        most = max(request.draw.topk_prompt for request in self.requests)
        target = torch.tensor([request.prompt[1:] for request in self.requests])
        found, ids, tops = [torch.empty(len(target), 0)], [], []
        places = torch.arange(target.shape[1]).split(max(1, _BLOCK // len(target)))
        for at in places if target.numel() else ():  # a single token has nothing before it
            logp = self.base.lane_logits(self, read, read.hidden[:, at]).log_softmax(-1).cpu()
            found.append(logp.gather(-1, target[:, at, None])[..., 0])
            if most:
                values, likeliest = logp.topk(most)
                ids.append(likeliest)
                tops.append(values)
        for i, request in enumerate(self.requests):
            k = request.draw.topk_prompt
            if request.draw.prompt_logprobs:
                request.samples.prompt_logprobs = torch.cat([part[i] for part in found])
            if k:
                none = torch.empty(0, k)
                request.samples.topk_prompt = (
                    torch.cat([none.long(), *(part[i, :, :k] for part in ids)]),
                    torch.cat([none, *(part[i, :, :k] for part in tops)]),
                )

    def _write(self, read: Read, logits: Tensor) -> None:
        """Token after token, until the last sample has its last."""
        base, cache = self.base, read.cache
        while True:
            logits = logits.cpu()
            if not logits.amax(-1).isfinite().all():
                raise UserError("the model gives NaN or infinity here: weights of the adapter are too large")
            logp = logits.log_softmax(-1)
            draws = [row.request.draw for row in self.rows]
            tokens = choose(logits, draws, [row.random for row in self.rows])
            likely = logp.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
            stay: list[int] = []
            for i, (row, draw, token, logprob) in enumerate(
                zip(self.rows, draws, tokens, likely, strict=True)
            ):
                if not row.wanted:
                    continue
                if draw.topk:
                    values, ids = logp[i].topk(draw.topk)
                    row.sample.top.append((ids.tolist(), values.tolist()))
                if row.take(token, logprob):
                    row.request.left -= 1
                else:
                    stay.append(i)
            if not stay:
                return
            if len(stay) < len(self.rows):
                cache = _chosen(cache, stay, len(self.rows))
                self.rows = [self.rows[i] for i in stay]
                tokens = [tokens[i] for i in stay]
                self.hold([row.request.weights for row in self.rows])
            self.pause()
            if cache is None:  # a model that keeps none reads it all again
                row = self.rows[0]
                read = base.read(torch.tensor([row.request.prompt + row.sample.tokens]))
            else:
                read = base.read(torch.tensor(tokens)[:, None], cache, keep=True)
                cache = read.cache
            logits = base.lane_logits(self, read, read.hidden[:, -1])


def _chosen(cache: Any, rows: Sequence[int], size: int) -> Any:
    """A cache of some of its rows, some of them several times."""
    if list(rows) != list(range(size)):
        cache.batch_select_indices(torch.tensor(rows))
    return cache


def choose(logits: Tensor, draws: Sequence[Draw], randoms: Sequence[torch.Generator]) -> list[int]:
    """A token for each row of logits (rows, vocabulary), by its own rules and with its own generator."""
    warm = torch.tensor([draw.temperature or 1.0 for draw in draws])
    scaled = logits / warm[:, None].to(logits)
    for i, draw in enumerate(draws):
        if 0 < draw.top_k < scaled.shape[1]:
            row = scaled[i]
            scaled[i] = row.where(row >= row.topk(draw.top_k).values[-1], -torch.inf)
    probabilities = scaled.softmax(-1)
    for i, draw in enumerate(draws):
        if draw.top_p < 1:
            ordered, places = probabilities[i].sort(descending=True, stable=True)
            beyond = ordered.cumsum(0) - ordered >= draw.top_p
            probabilities[i, places[beyond]] = 0.0
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    at = torch.cat([torch.rand(1, dtype=torch.float64, generator=random) for random in randoms])
    # The first token that reaches further; one that has no probability never does.
    drawn = torch.searchsorted(reached, (at * reached[:, -1])[:, None], right=True)[:, 0]
    drawn = drawn.clamp_max(logits.shape[1] - 1)
    likeliest = logits.argmax(-1)
    return [int(likeliest[i]) if draw.temperature == 0 else int(drawn[i]) for i, draw in enumerate(draws)]


def advance(base: Base, writers: Sequence[Writer]) -> None:
    """A token for each of the writers' samples."""
    with base.running(backward=False):
        run(writers)
