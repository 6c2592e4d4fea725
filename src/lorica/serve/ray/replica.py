"""A replica: the whole application over one engine, asked through Ray and not over a port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from starlette.types import ASGIApp, Message

from lorica.errors import LoricaError
from lorica.serve.http import Keys, Served, Settings, make_app
from lorica.serve.opening import look_at, open_engine
from lorica.serve.ray.ingress import BEGUN
from lorica.serve.ray.options import Options
from lorica.serve.ray.registry import Follower, Journal

SYNC = 2.0
"""Seconds between two looks at the registry."""

log = logging.getLogger("lorica.serve")


async def ask(app: ASGIApp, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message]:
    """An application's answer to a request, message by message.

    Args:
        app: of ASGI.
        scope: of HTTP.
        body: of the request, whole.

    Yields:
        ASGI's messages, as the application sends them. To close it is to leave, as a client does.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    told, left = False, asyncio.Event()

    async def receive() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(dict(scope), receive, sent.put)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await task
    finally:
        left.set()
        if not task.done():
            # An answer is closed once its client left; what has no answer yet is ended.
            await asyncio.wait({task}, timeout=1)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Replica:
    """One copy of the base, with an engine and the endpoints.

    Args:
        options: how it is served.
        registry: handle of the `Registry`.
    """

    # Ray awaits it, as it does `__del__`.
    async def __init__(self, options: Options, registry: Any) -> None:  # type: ignore[misc]
        """Load the base, follow the registry, and begin to serve."""
        from ray import serve

        logging.getLogger("lorica").setLevel(logging.INFO)
        self._registry = registry
        self._life = contextlib.AsyncExitStack()  # ended by `__del__`, however far this comes
        keys = Keys() if options.api_key_file is None else Keys.read(options.api_key_file)
        source = await asyncio.to_thread(look_at, options.model)
        engine = await asyncio.to_thread(
            open_engine,
            source,
            [] if options.adapters is None else [options.adapters],
            slots=options.slots,
            max_rank=options.max_rank,
            dtype=options.dtype,
            context=options.context,
            wait=options.max_wait,
        )
        settings = Settings(allow_load=options.allow_load)
        self.here = Served(
            options.name or source.model, engine, settings, keys, source.default, not options.base_template
        )
        self._follower = Follower(self.here)
        self._app = make_app(self.here, drain=options.drain)
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))
        await self._sync()
        syncing = asyncio.create_task(self._keep_in_step())
        self._life.callback(syncing.cancel)
        self._id = serve.get_replica_context().replica_id.unique_id

    async def answer(self, scope: Mapping[str, Any], body: bytes) -> AsyncIterator[Message]:
        """One request: what it is called here, then ASGI's messages."""
        yield {"type": BEGUN, "model": self.here.model}
        async with contextlib.aclosing(ask(self._app, scope, body)) as messages:
            async for message in messages:
                yield message

    async def follow(self, journal: Journal) -> dict[str, str]:
        """Do what is new in the journal; gives what could not be done, by name."""
        return await self._follower.follow(journal)

    async def metrics(self) -> tuple[str, bytes]:
        """The replica's name, and its part of /metrics."""
        return self._id, self.here.metrics.text()

    async def alive(self) -> bool:
        """Whether it takes requests."""
        return self.here.engine.alive and not self.here.closing

    async def check_health(self) -> None:
        """Ray's question after health: it replaces a replica whose engine is dead."""
        if not self.here.engine.alive:
            raise LoricaError("the engine does not run")

    async def __del__(self) -> None:
        """Finish what is asked, and end."""
        await self._life.aclose()

    async def _sync(self) -> None:
        await self._follower.follow(await self._registry.sync.remote(self._follower.journal))

    async def _keep_in_step(self) -> None:
        while True:
            await asyncio.sleep(SYNC)
            try:
                await self._sync()
            except Exception as error:  # the registry is being started again
                log.warning("the registry does not answer: %s", error)
