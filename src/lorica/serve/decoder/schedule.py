"""The requests in the batch and the adapters in the slots; all of it in the engine's thread.

    commands ──▶ waiting ──a slot, room──▶ running ──▶ told

First come, first served, with two exceptions that keep slots from being the bottleneck. A request whose
adapter is mounted passes those that wait for a slot; but when one has waited longer than `patience`, adapters
that are mounted take no more requests until a slot is free for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.errors import AdapterError
from lorica.layers.slots import Place
from lorica.model import disabled
from lorica.model.slots import Fitted, Slots
from lorica.serve.decoder.answers import Finish, Request, not_finite, too_late
from lorica.serve.decoder.batching import Batcher, Part, prompt_logits
from lorica.serve.decoder.sampling import choose_all, described
from lorica.serve.engine import EngineDown, Token
from lorica.serve.store import Content
from lorica.state import STATE

log = logging.getLogger("lorica.serve")


class Told(NamedTuple):
    """A step's result for a request."""

    request: Request
    tokens: tuple[Token, ...]
    finish: Finish | None
    prompt: tuple[Token, ...] = ()
    error: Exception | None = None


@dataclass(eq=False)
class Counts:
    """The engine's counts since it was made; `Stats` has them under these names, with ``_total`` behind."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    mounts: int = 0
    evictions: int = 0
    slot_waits: int = 0
    timeouts: int = 0


class Schedule:
    """Steers a `Batcher`; see `lorica.serve.decoder.batching.Conductor`.

    Args:
        model: the decoder.
        slots: on it.
        requests: in the batch together.
        chunk: tokens of a prompt whose logits are taken in one pass.
        patience: seconds that requests of mounted adapters pass one that waits for a slot.
        wait: seconds after which a request that is in no batch yet is refused; None for never.
        tell: called in the engine's thread with a step's results, and with requests that are gone.
        ended: called in the engine's thread when it ends, with the error that ended it.
    """

    def __init__(
        self,
        model: Any,
        slots: Slots,
        *,
        requests: int,
        chunk: int,
        patience: float,
        wait: float | None,
        tell: Callable[[Sequence[Told], Sequence[Request]], None],
        ended: Callable[[BaseException | None], None],
    ) -> None:
        self.model, self.slots = model, slots
        self.requests, self.chunk, self.patience, self.wait = requests, chunk, patience, wait
        self.waiting: dict[str, Request] = {}
        self.running: dict[str, Request] = {}
        self.counts = Counts()
        self._tell, self._ended = tell, ended
        self._commands: deque[tuple[str, Any]] = deque()
        self._mounted: dict[Place, Content] = {}
        self._scoring: deque[tuple[Request, Iterator[Tensor]]] = deque()
        self._fresh: list[tuple[Request, Token | None]] = []
        self._blocked_since: float | None = None

    # From any thread.

    def submit(self, request: Request) -> None:
        """Queue a request whose adapter is in memory."""
        self._commands.append(("put", request))

    def cancel(self, request: Request) -> None:
        """Drop a request, wherever it is."""
        self._commands.append(("cancel", request))

    def drop(self, content: Content) -> None:
        """Free the slot of a content that left memory."""
        self._commands.append(("drop", content))

    @property
    def mounted(self) -> list[Content]:
        """The contents in slots."""
        return list(self._mounted.values())

    def reset(self) -> None:
        """Forget all requests, once the engine's thread is gone; adapters stay mounted."""
        self.waiting.clear()
        self.running.clear()
        self._scoring.clear()
        self._fresh = []
        self._commands = deque(own for own in self._commands if own[0] == "drop")
        for content in self._mounted.values():
            content.running = 0

    # In the engine's thread.

    def between(self, batcher: Batcher) -> bool:
        """Let requests come and go; see `Conductor`."""
        gone = self._obey(batcher)
        told = self._refuse_late(batcher) + self._score(batcher) + self._admit(batcher)
        if gone or told:
            self._tell(told, gone + [own.request for own in told if own.finish or own.error])
        return bool(self._scoring)

    def order(self, id: str) -> tuple[int, int]:
        """By slot, the base first."""
        return self._place(self.running[id]) or (-1, -1)

    def packed(self, parts: Sequence[Part], heads: Sequence[str] | None) -> None:
        """Have each token's adapter act, and none that the model carries for others."""
        self._rest()
        for part in parts:
            self.running[part.id].begun = True
        places = {part.id: self._place(self.running[part.id]) for part in parts}
        runs = [(places[part.id], part.tokens) for part in parts]
        self.slots.choose(runs, None if heads is None else [(places[id], 1) for id in heads])

    def choose(self, ids: Sequence[str], logits: Tensor) -> Tensor:
        """Choose tokens by each request's rules."""
        requests = [self.running[id] for id in ids]
        tokens = choose_all([request.sampler for request in requests], logits)
        self._fresh = list(zip(requests, tokens, strict=True))
        return torch.tensor([0 if token is None else token.id for token in tokens])

    def stepped(self) -> None:
        """Tell the tokens of the step."""
        told = [
            Told(request, (token,), request.finish_after(token.id)) for request, token in self._fresh if token
        ]
        self.counts.steps += 1
        self.counts.generated_tokens += len(told)
        for request in (request for request, token in self._fresh if not token):
            told.append(Told(request, (), None, error=not_finite(request.name)))
            self.cancel(request)
        self._fresh = []
        over = [own.request for own in told if own.finish is not None]
        for request in over:
            self._leave(request)
        if told:
            self._tell(told, over)

    def namespace(self, id: str) -> Sequence[int]:
        """By content and tenant."""
        return self.running[id].space

    def matched(self, id: str, tokens: int) -> None:
        """Count the tokens found in the prefix cache."""
        self.counts.cached_tokens += tokens

    def ended(self, error: BaseException | None) -> None:
        """Nothing acts any more in this thread, and no slot is in use."""
        self.slots.rest()
        self._ended(error)

    def _obey(self, batcher: Batcher) -> list[Request]:
        gone: list[Request] = []
        dropped: list[str] = []
        while self._commands:
            what, thing = self._commands.popleft()
            if what == "put":
                self.waiting[thing.id] = thing
            elif what == "drop":
                self._free(thing)
            elif self.waiting.pop(thing.id, None) is not None:
                gone.append(thing)
            elif thing.id in self.running:
                self._leave(thing)
                self._scoring = deque(own for own in self._scoring if own[0] is not thing)
                dropped.append(thing.id)
                gone.append(thing)
        if dropped:
            batcher.cancel(dropped)
        return gone

    def _refuse_late(self, batcher: Batcher) -> list[Told]:
        """Drop requests that waited too long: for a place in the batch, a slot, or room in the cache."""
        if self.wait is None:
            return []
        before = time.monotonic() - self.wait
        late = [own for own in self.waiting.values() if own.since < before]
        stuck = [own for own in self.running.values() if own.since < before and not (own.begun or own.scored)]
        for request in late:
            del self.waiting[request.id]
        for request in stuck:
            self._leave(request)
        self._scoring = deque(own for own in self._scoring if own[0] not in stuck)
        if stuck:
            batcher.cancel([own.id for own in stuck])
        self.counts.timeouts += len(late) + len(stuck)
        return [Told(own, (), None, error=too_late(self.wait)) for own in late + stuck]

    def _admit(self, batcher: Batcher) -> list[Told]:
        """Let those in that can be; returns those whose adapter could not be mounted."""
        now, failed = time.monotonic(), list[Told]()
        waits: Request | None = None
        for request in list(self.waiting.values()):
            if len(self.running) >= self.requests:
                break
            content = request.content
            late = waits is not None and now - (self._blocked_since or now) > self.patience
            if content is not None and content.slot is None:
                if waits is not None:
                    continue
                try:
                    mounted = self._mount(content)
                except Exception as error:  # of this adapter, or memory: others are answered still
                    log.exception("%s could not be mounted", request.name)
                    del self.waiting[request.id]
                    failed.append(Told(request, (), None, error=EngineDown(f"{request.name}: {error}")))
                    continue
                if mounted:
                    self._enter(request, batcher)
                else:
                    waits = request
                    if self._blocked_since is None:
                        self._blocked_since = now
                        self.counts.slot_waits += 1
            elif content is None or not late:
                self._enter(request, batcher)
        if waits is None:
            self._blocked_since = None
        return failed

    def _enter(self, request: Request, batcher: Batcher) -> None:
        del self.waiting[request.id]
        self.running[request.id] = request
        if request.content is not None:
            request.content.running += 1
        self.counts.prompt_tokens += len(request.prompt)
        if request.sampling.prompt_logprobs is not None:
            self._scoring.append((request, iter(prompt_logits(self.model, request.prompt, self.chunk))))
        else:
            self._run(request, batcher)

    def _run(self, request: Request, batcher: Batcher) -> None:
        batcher.put(request.id, request.prompt, request.sampling.max_tokens, request.ends)

    def _leave(self, request: Request) -> None:
        del self.running[request.id]
        content = request.content
        if content is not None:
            content.running -= 1
            content.used = time.monotonic()

    def _score(self, batcher: Batcher) -> list[Told]:
        """Take the logits of some more of one prompt."""
        if not self._scoring:
            return []
        request, chunks = self._scoring[0]
        asked, prompt = request.sampling.prompt_logprobs, request.prompt
        if not request.scored:
            request.scored.append(Token(prompt[0]))
        done = len(request.scored) - 1
        self._rest()
        self.slots.choose([(self._place(request), min(self.chunk, len(prompt) - done))])
        logits = next(chunks)
        following = prompt[done + 1 : done + 1 + len(logits)]
        request.scored += [
            described(id, row, asked)
            for id, row in zip(following, logits[: len(following)].cpu(), strict=True)
        ]
        if not all(own.logprob is None or math.isfinite(own.logprob) for own in request.scored):
            self.cancel(request)
            return [Told(request, (), None, error=not_finite(request.name))]
        if done + len(logits) < len(prompt):
            return []
        self._scoring.popleft()
        scored = tuple(request.scored)
        if request.sampling.max_tokens == 0:
            self._leave(request)
            return [Told(request, (), "length", scored)]
        self._run(request, batcher)
        return [Told(request, (), None, scored)]

    def _rest(self) -> None:
        """Have no adapter act in this thread that somebody trains on the model."""
        state = self.slots.root.__dict__.get(STATE)
        if state is not None and state.own_choice() is None:
            disabled(self.slots.root)

    def _place(self, request: Request) -> Place | None:
        content = request.content
        if content is None:
            return None
        assert isinstance(content.slot, Place)
        return content.slot

    def _mount(self, content: Content) -> bool:
        """Copy a content into a slot, if one is free or held by nobody."""
        if self.slots.full:
            idle = [own for own in self._mounted.values() if not own.running]
            if not idle:
                return False
            self._free(min(idle, key=lambda own: own.used))
            self.counts.evictions += 1
        fitted = content.fitted
        if not isinstance(fitted, Fitted):
            raise AdapterError(f"{type(fitted).__name__} was fitted for another engine")
        content.slot = place = self.slots.mount(fitted)
        self._mounted[place] = content
        self.counts.mounts += 1
        return True

    def _free(self, content: Content) -> None:
        place = content.slot
        if isinstance(place, Place) and not content.running:
            self.slots.unmount(place)
            del self._mounted[place]
            content.slot = None
