"""Server-sent events: chunks as they come, comments in silence, an error in the middle if need be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lorica.plain import as_json
from lorica.serve.engine import Step
from lorica.serve.http.errors import LEFT, as_api_error
from lorica.serve.http.schemas import StreamOptions
from lorica.serve.http.settings import Settings

if TYPE_CHECKING:
    from lorica.serve.http.answers import Choice, Running

DONE = b"data: [DONE]\n\n"
_STILL_HERE = b": waiting\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

log = logging.getLogger("lorica.serve")


def event(value: Any) -> bytes:
    """One event of JSON."""
    return b"data: " + as_json(value, indent=None).encode() + b"\n\n"


class Events(StreamingResponse):
    """A stream of events that ends with ``[DONE]``, or with an error object.

    Args:
        chunks: the chunks, in order.
        close: called when all is sent, and when the client leaves.
        settings: how long the stream may be silent, and its client read nothing.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[Any], close: Callable[[], Awaitable[None]], settings: Settings
    ) -> None:
        """Keep them."""
        self._chunks, self._close, self._told = chunks, close, False
        self._stalled = settings.stalled
        super().__init__(self._events(settings.keep_alive), headers=_HEADERS)

    async def _events(self, keep_alive: float) -> AsyncIterator[bytes]:
        # A chunk that is waited for goes on being waited for while comments are sent.
        waiting: asyncio.Future[Any] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(self._chunks))  # type: ignore[arg-type]
                done, _ = await asyncio.wait((waiting,), timeout=keep_alive)
                if not done:
                    yield _STILL_HERE
                    continue
                finished, waiting = waiting, None
                try:
                    yield event(finished.result())
                except StopAsyncIteration:
                    self._told = True
                    yield DONE
                    return
        except Exception as error:
            told = as_api_error(error)
            if told.status == 500:
                log.exception("a stream failed")
            self._told = True
            yield event(told.body)
        finally:
            if waiting is not None:
                with anyio.CancelScope(shield=True):
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, and watch for the client to leave, in any version of ASGI."""

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not self._told:  # the end of the answer is told as a disconnection too
                scope["state"]["status"] = LEFT
            group.cancel_scope.cancel()

        async def patient(message: Any) -> None:
            with anyio.move_on_after(self._stalled) as waiting:
                await send(message)
            if waiting.cancelled_caught:  # who never reads would hold its place for good
                scope["state"]["status"] = LEFT
                group.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(leave)
                await self.stream_response(patient)
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self.body_iterator.aclose()  # type: ignore[attr-defined]
                await self._close()


async def with_usage(
    running: Running,
    chunk: Callable[[Choice, Step], dict[str, Any] | None],
    options: StreamOptions | None,
    head: Mapping[str, Any],
    usage: Callable[[Running], dict[str, int]],
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of all answers, and the one that tells the usage.

    Args:
        running: the answers.
        chunk: makes a step's chunk; None where it has none.
        options: the parts of the usage that are asked for.
        head: the fields that every chunk has.
        usage: tokens by now.
    """
    told = options is not None and bool(options.include_usage)
    always = options is not None and bool(options.continuous_usage_stats)
    async for choice, step in running:
        if (found := chunk(choice, step)) is not None:
            yield {**found, **({"usage": usage(running) if always else None} if told else {})}
    if told:
        yield {**head, "choices": [], "usage": usage(running)}
