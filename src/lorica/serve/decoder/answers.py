"""A request in the engine, and its answer in the event loop.

engine's thread   Request ──tokens──▶ Channel ──▶ Answer   event loop
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorica.serve.decoder.sampling import Sampler
from lorica.serve.decoder.text import Writer
from lorica.serve.engine import EngineDown, Overloaded, RefusedAdapter, Sampling, Step, Token
from lorica.serve.store import Content, Lease

Finish = Literal["stop", "length"]


class Channel:
    """The steps of one request that nobody has read yet; for one event loop."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.prompt: list[Token] = []
        self.finish: Finish | None = None
        self.error: Exception | None = None
        self._told = asyncio.Event()

    def tell(self, tokens: Sequence[Token], finish: Finish | None, prompt: Sequence[Token] = ()) -> None:
        """Some more came."""
        self.tokens += tokens
        self.prompt += prompt
        self.finish = finish
        self._told.set()

    def fail(self, error: Exception) -> None:
        """Nothing more comes."""
        if self.finish is None and self.error is None:
            self.error = error
            self._told.set()

    async def wait(self) -> None:
        """Until there is something.

        Raises:
            LoricaError: the request failed.
        """
        await self._told.wait()
        self._told.clear()
        if self.error is not None:
            self._told.set()
            raise self.error


@dataclass(eq=False)
class Request:
    """One request, as the engine has it.

    Args:
        id: nobody else's.
        prompt: token ids.
        sampling: how its answer is drawn.
        ends: tokens that end it.
        space: namespace of its prefix in the cache; see `Conductor.namespace`.
        channel: where its tokens go.
        lease: of its adapter; None for the base.
        name: of its adapter.
        since: when it was admitted, by the monotonic clock.
        begun: whether some of its tokens were in a batch.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    ends: frozenset[int]
    channel: Channel
    lease: Lease | None = None
    name: str | None = None
    space: tuple[int, ...] = ()
    scored: list[Token] = field(default_factory=list)
    count: int = 0
    since: float = field(default_factory=time.monotonic)
    begun: bool = False

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.sampling, self.prompt)

    @property
    def content(self) -> Content | None:
        """Its adapter; None for the base."""
        return None if self.lease is None else self.lease.content

    def finish_after(self, token: int) -> Finish | None:
        """Count a token, and say whether the answer ends with it."""
        self.count += 1
        if token in self.ends:
            return "stop"
        return "length" if self.count >= self.sampling.max_tokens else None


def too_late(seconds: float) -> Overloaded:
    """The error of a request that was in no batch after so long."""
    return Overloaded(
        f"the request waited {seconds:g} s for its turn, which is as long as it may", retry_after=seconds
    )


def not_finite(name: str | None) -> RefusedAdapter:
    """The error of a request whose model overflowed."""
    return RefusedAdapter(f"{name or 'the base'} gives NaN or infinity for this prompt; its weights overflow")


class DecodedAnswer:
    """The steps of one answer; closing it cancels the request.

    Args:
        request: whose answer it is.
        tokenizer: writes its text; None leaves it empty.
        cancel: drops the request from the engine; called in the event loop.
        left: likewise, from the thread that collects garbage.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Any,
        cancel: Callable[[Request], None],
        left: Callable[[Request], None],
    ) -> None:
        self._request, self._cancel, self._left = request, cancel, left
        self._writer = Writer(tokenizer, request.sampling.stop)
        self._over = False

    def __aiter__(self) -> AsyncIterator[Step]:
        """Itself."""
        return self

    async def __anext__(self) -> Step:
        """The steps since the last call; waits for one.

        Raises:
            RefusedAdapter: the adapter could not be read, or does not fit.
            EngineDown: the engine died, or was stopped.
        """
        channel = self._request.channel
        while not self._over:
            if not (channel.tokens or channel.prompt or channel.finish):
                try:
                    await channel.wait()
                except Exception:
                    self._over = True
                    raise
                continue
            step = self._step(channel)
            if step.text or step.tokens or step.prompt or step.finish:
                return step
        raise StopAsyncIteration

    def _step(self, channel: Channel) -> Step:
        came, finish, prompt = channel.tokens, channel.finish, tuple(channel.prompt)
        channel.tokens, channel.prompt = [], []
        text, taken = "", 0
        for token in came:
            text += self._writer.write((token.id,))
            taken += 1
            if self._writer.stopped:
                break
        if finish is not None and not self._writer.stopped:
            text += self._writer.finish()
        if self._writer.stopped:
            if finish is None:
                self._cancel(self._request)
            finish = "stop"
        self._over = finish is not None
        return Step(text, tuple(came[:taken]), finish, prompt)

    async def aclose(self) -> None:
        """Cancel the rest."""
        if not self._over:
            self._over = True
            self._cancel(self._request)
            self._request.channel.fail(EngineDown("the answer was closed"))

    def __del__(self) -> None:
        """An answer that nobody reads any more is cancelled."""
        if not self._over:
            self._left(self._request)
