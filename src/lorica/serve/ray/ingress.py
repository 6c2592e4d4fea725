"""The ingress: reads a request's `model`, chooses a replica by it, and passes its answer on.

client ──▶ Ingress ──`model`──▶ the replica that the name's hash says, the next if that is full
              │                    dead ──▶ another, while nothing was answered yet
              └──▶ 429 the queue is full, 503 no replica lives
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from lorica.serve.http.errors import ApiError, as_api_error, refused
from lorica.serve.http.metrics import CONTENT_TYPE, joined
from lorica.serve.http.settings import Settings
from lorica.serve.http.stream import event
from lorica.serve.ray.options import Options

BEGUN = "lorica.begun"
"""Type of a replica's message before those of ASGI: it has the request."""
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
"""Sends what has one session to one replica; by hashes, so that names which clients make up cost nothing."""
TRIES = 3
"""Replicas that may die over one request."""
PATIENCE = 1.0
"""Seconds that a request waits for a replica before it is asked whether any lives."""
FOLLOWING = 60.0
"""Seconds that all replicas have to load an adapter which one of them has loaded."""
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "query_string", "client", "server")
_CHANGES = {"/v1/load_lora_adapter": "load", "/v1/unload_lora_adapter": "unload"}

log = logging.getLogger("lorica.serve")


class Ingress:
    """The application behind Ray Serve's proxies.

    Args:
        options: how the base is served.
        replicas: handle of the replicas.
        registry: handle of the `Registry`.
    """

    def __init__(self, options: Options, replicas: Any, registry: Any) -> None:
        """Keep them."""
        self._registry, self._all = registry, replicas
        self._replicas = replicas.options(method_name="answer", stream=True)
        self._open = options.anonymous or options.api_key_file is not None
        self._most = Settings().body
        self._base: str | None = options.name
        self._looked: tuple[float, asyncio.Task[bool] | None] = (0.0, None)

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        try:
            return await self._answer(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            told = as_api_error(error)
            if told.status == 500:
                log.exception("%s %s failed", request.method, request.url.path)
            return told.response()

    async def _answer(self, request: Request) -> Response:
        self._check_near(request)
        body = await self._body(request)
        path = request.url.path.removeprefix(request.scope.get("root_path", "").rstrip("/"))
        scope: dict[str, Any] = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        scope |= {"path": path, "raw_path": path.encode(), "root_path": ""}
        scope["headers"] = [(bytes(name), bytes(value)) for name, value in request.scope["headers"]]
        asked = _json(body) if request.method == "POST" else {}
        named = asked.get("lora_name" if path in _CHANGES else "model")
        relay = Relay(self, scope, body, self._session(named))
        start = await relay.start()
        if relay.streams:
            return _with_headers(StreamingResponse(relay.rest(), start["status"]), start)
        content = relay.content
        if start["status"] == 200 and path in _CHANGES:
            await self._tell_all(_CHANGES[path], asked)
        if start["status"] == 200 and path == "/metrics":
            told = await self._all.broadcast("metrics").results_async(return_exceptions=True)
            parts = [each for each in told if not isinstance(each, BaseException)]
            return Response(joined(parts), media_type=CONTENT_TYPE)
        return _with_headers(Response(content, start["status"]), start)

    def _check_near(self, request: Request) -> None:
        """Refuse other machines, unless there are keys or it was said that they may ask."""
        host = request.client.host if request.client is not None else None
        if self._open or host is None:
            return
        with contextlib.suppress(ValueError):
            if not ipaddress.ip_address(host).is_loopback:
                raise ApiError(
                    403,
                    "this server was started without keys, and answers its own machine alone; start it with "
                    "api_key_file=FILE, or with anonymous=true if that is meant",
                    code="not_allowed",
                )

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > self._most:
                raise ApiError(
                    413, f"the request is larger than {self._most:,} bytes, which is the most that is read"
                )
        return b"".join(parts)

    def _session(self, named: Any) -> str:
        """The key that the requests for an adapter share; nothing for the base, which goes anywhere."""
        if not isinstance(named, str) or named == self._base:
            return ""
        return named if self._base is None else named.removeprefix(f"{self._base}:")

    def begun(self, message: Message) -> None:
        """A replica has a request, and says what its base is called."""
        self._base = message["model"]

    def send(self, scope: Mapping[str, Any], body: bytes, session: str) -> Any:
        """Ask a replica."""
        handle = self._replicas.options(session_id=session) if session else self._replicas
        return handle.remote(scope, body)

    async def lives(self) -> bool:
        """Whether a replica takes requests; looked at once a second, whoever asks."""
        at, task = self._looked
        if task is None or (task.done() and time.monotonic() - at > PATIENCE):
            task = asyncio.create_task(self._look())
            self._looked = (time.monotonic(), task)
        return await asyncio.shield(task)

    async def _look(self) -> bool:
        try:
            told = await self._all.broadcast("alive").results_async(timeout_s=10, return_exceptions=True)
        except DeploymentUnavailableError:
            return False
        except TimeoutError:  # busy is not dead
            return True
        return any(each is True for each in told)

    async def _tell_all(self, what: str, asked: Mapping[str, Any]) -> None:
        """Have all replicas do what one of them did.

        Raises:
            ApiError: one of them cannot; the adapter is served by none then.
        """
        name = asked["lora_name"]
        path = (asked.get("lora_path") or "") if what == "load" else None
        journal = await self._registry.note.remote(name, path, bool(asked.get("pinned")))
        told = await self._all.broadcast("follow", journal).results_async(
            timeout_s=FOLLOWING, return_exceptions=True
        )
        problems = [each[name] for each in told if isinstance(each, dict) and name in each]
        if what == "load" and problems:
            journal = await self._registry.note.remote(name, None)
            await self._all.broadcast("follow", journal).results_async(return_exceptions=True)
            raise refused(
                f"one replica has loaded {name!r}, and {len(problems)} cannot: {problems[0]}; the folder has "
                "to be on storage that all machines share",
                "lora_path",
                "adapter_refused",
            )


class Relay:
    """One request, asked of a replica, and of another if that one dies before anything was answered.

    Args:
        ingress: whose.
        scope: of HTTP.
        body: of the request.
        session: those with the same one go together; empty for anywhere.

    Attributes:
        streams: whether the answer comes event by event.
        content: the answer's body, where it does not.
    """

    def __init__(self, ingress: Ingress, scope: Mapping[str, Any], body: bytes, session: str) -> None:
        """Keep them."""
        self._ingress, self._asked = ingress, (scope, body, session)
        self._messages: Any = None
        self.streams, self.content = False, b""

    async def start(self) -> Message:
        """The head of the answer; all of it, unless it streams.

        Raises:
            ApiError: too many wait, or no replica lives.
        """
        for _ in range(TRIES):
            try:
                return await self._try()
            except BackPressureError as error:
                raise ApiError(429, f"the queue is full: {error}", code="overloaded", retry_after=1) from None
            except RayActorError:
                log.warning("a replica died over a request; another is asked")
            except DeploymentUnavailableError:
                break
            except BaseException:
                self.cancel()
                raise
        raise _nobody()

    async def _try(self) -> Message:
        self._messages = self._ingress.send(*self._asked)
        first = asyncio.ensure_future(anext(self._messages))
        try:
            while not (await asyncio.wait({first}, timeout=PATIENCE))[0]:
                if not await self._ingress.lives():
                    raise _nobody()
        except BaseException:
            first.cancel()
            self.cancel()
            raise
        begun = first.result()
        assert begun["type"] == BEGUN
        self._ingress.begun(begun)
        start = await anext(self._messages)
        headers = {bytes(name).lower(): bytes(value) for name, value in start["headers"]}
        self.streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        if not self.streams:
            self.content = b"".join([message.get("body", b"") async for message in self._messages])
        return start

    async def rest(self) -> AsyncIterator[bytes]:
        """The events of an answer that streams; the last is an error if the replica dies."""
        try:
            async for message in self._messages:
                if message.get("body"):
                    yield message["body"]
        except RayActorError:
            told = ApiError(
                503, "the replica died in the middle of the answer; ask again", code="engine_down"
            )
            yield event(told.body)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Leave; nothing happens where the answer is over."""
        if self._messages is not None:
            self._messages.cancel()


def _nobody() -> ApiError:
    return ApiError(
        503, "no replica lives; Ray starts others, which takes as long as loading the base",
        code="engine_down", retry_after=10,
    )  # fmt: skip


def _json(body: bytes) -> Mapping[str, Any]:
    """The fields of a body; none where it is no JSON object, of which the replica says why."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _with_headers(response: Response, start: Message) -> Response:
    """A response with the headers that the replica gave it."""
    response.raw_headers = [(bytes(name), bytes(value)) for name, value in start["headers"]]
    return response
