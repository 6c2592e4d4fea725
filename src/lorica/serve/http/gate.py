"""The gate before every endpoint: keys, sizes of bodies, numbers of requests; and the log.

request ──▶ key ──▶ room ──▶ body ──▶ endpoint      each refusal is OpenAI's error object
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorica.serve.http.errors import LEFT, ApiError, as_api_error
from lorica.serve.http.keys import NOBODY, Key, Keys
from lorica.serve.http.metrics import Metrics
from lorica.serve.http.settings import Settings

OPEN = frozenset(("/", "/health", "/ready", "/favicon.ico"))
"""Paths that need no key: the page holds nothing, and asks with the key that is typed into it."""
_AT_ONCE = frozenset(("/", "/health", "/ready", "/metrics", "/version", "/stats", "/v1/models"))
"""Paths that are answered however many requests there are."""

_PATIENCE = 8
"""Times the largest body that may pass unread before the connection is cut."""

log = logging.getLogger("lorica.serve")


class Gate:
    """Middleware of ASGI around the application.

    Args:
        app: the application.
        keys: who may ask.
        settings: the limits.
        metrics: the counts.
    """

    def __init__(self, app: ASGIApp, keys: Keys, settings: Settings, metrics: Metrics) -> None:
        """Keep them."""
        self._app, self._keys, self._settings, self._metrics = app, keys, settings, metrics
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        label = Headers(scope=scope).get("x-request-id", "")
        call = Call(send, label if label.isascii() and label.isprintable() and 0 < len(label) <= 128 else "")
        key, counted = NOBODY, False
        try:
            key = self._key(scope)
            self._room(scope["path"], key)
            self._running[key.name] += 1
            counted = True
            scope.setdefault("state", {}).update(key=key, id=call.id)
            await self._app(scope, await self._body(scope, receive), call.send)
        except Left:
            call.status = LEFT
        except Exception as error:
            told = as_api_error(error)
            if told.status == 500:
                log.exception("%s %s failed", scope["method"], scope["path"])
            if call.status is None:
                await told.response()(scope, receive, call.send)
            else:  # the answer is under way, and can only be cut
                raise
        finally:
            if counted:
                self._running[key.name] -= 1
            route = getattr(scope.get("route"), "path", None) or "other"
            status = scope.get("state", {}).get("status") or call.status or LEFT
            self._metrics.request(route, status, time.perf_counter() - call.begun)
            level = logging.DEBUG if route in _AT_ONCE else logging.INFO
            seconds = time.perf_counter() - call.begun
            log.log(level, "%s %s %s %.3f s %s", scope["method"], route, status, seconds, key.name)

    def _key(self, scope: Scope) -> Key:
        if scope["path"] in OPEN or not self._keys:
            return NOBODY
        headers = Headers(scope=scope)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = self._keys.find(given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key"))
        if found is None:
            raise ApiError(401, "no valid key was given; send it as Authorization: Bearer KEY")
        return found

    def _room(self, path: str, key: Key) -> None:
        if path in _AT_ONCE:
            return
        if self._running.total() >= self._settings.requests:
            raise ApiError(429, "the server has as many requests as it takes", retry_after=1)
        if self._keys and self._running[key.name] >= self._settings.per_key:
            raise ApiError(
                429,
                f"this key has {self._settings.per_key} requests running, which is as many as it may",
                code="rate_limit_exceeded",
                retry_after=1,
            )

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, and give a `receive` that tells it again, and then when the client leaves."""
        most = self._settings.body
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._settings.read):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Left
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body")
                    if size > most:
                        parts.clear()
                        # Who still sends does not read yet: some of what is left is let pass.
                        if not more or size > _PATIENCE * most:
                            raise _too_large(most)
                    if not more:
                        break
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {self._settings.read:g} s") from None
        body: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def again() -> Message:
            return body.pop() if body else await receive()

        return again


class Left(Exception):
    """The client is gone."""


class Call:
    """One request's answer as it goes out.

    Args:
        send: ASGI's.
        label: the client's own name for the request; an id is made where it has none.
    """

    def __init__(self, send: Send, label: str) -> None:
        """Begin to count."""
        self._send, self.id = send, label or uuid.uuid4().hex
        self.status: int | None = None
        self.begun = time.perf_counter()

    async def send(self, message: Any) -> None:
        """Send on, with the request's id among the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the request is larger than {most:,} bytes, which is the most that is read")
