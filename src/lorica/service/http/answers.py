"""The asking client, and errors as HTTP has them: an error inside a future is none of the request for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from lorica.errors import LoricaError
from lorica.service.errors import GoneError, ServiceDown, UserError
from lorica.service.state.service import Service
from lorica.service.state.tenants import Tenant

LARGEST = 64 << 20
"""Bytes of a request's body, unpacked."""


class Route(APIRoute):
    """A route whose errors have one form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:  # noqa: D102
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except GoneError as error:
                return JSONResponse({"detail": str(error)}, 404)
            except ServiceDown as error:
                return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "1"})
            except UserError as error:
                return JSONResponse({"detail": str(error)}, 422)
            except LoricaError as error:
                return JSONResponse({"detail": str(error)}, 500)

        return answer


def service_of(request: Request) -> Service:
    """The service that the application holds."""
    return request.app.state.service


def tenant_of(request: Request) -> Tenant:
    """The tenant of a request.

    Raises:
        HTTPException: nobody whose key is known.
    """
    key = request.headers.get("x-api-key")
    if key is None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key if scheme.lower() == "bearer" else None
    tenant = service_of(request).tenants.find(key)
    if tenant is None:
        # Whoever has no key is not kept waiting for another request of theirs.
        close = {"Connection": "close"}
        raise HTTPException(401, "no such key; send it as X-API-Key", close)
    return tenant


async def body_of(request: Request) -> bytes:
    """A request's body, unpacked.

    Raises:
        HTTPException: it is too large, or packed in an unknown way.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST:
            raise HTTPException(413, f"a body may have {LARGEST:,} bytes; send fewer datums at once")
        parts.append(part)
    body = b"".join(parts)
    packed = request.headers.get("content-encoding", "identity")
    if packed == "zstd":
        import zstandard

        try:
            reader = zstandard.ZstdDecompressor().stream_reader(body)
            body = reader.read(LARGEST + 1)
        except zstandard.ZstdError as error:
            raise HTTPException(422, f"the body is no zstd: {error}") from None
        if len(body) > LARGEST:
            raise HTTPException(413, f"a body may have {LARGEST:,} bytes; send fewer datums at once")
    elif packed != "identity":
        raise HTTPException(415, f"content-encoding {packed!r} is not known; send zstd, or none")
    return body


def json_of(body: bytes) -> dict[str, Any]:
    """A body that is a JSON object.

    Raises:
        HTTPException: it is none.
    """
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise HTTPException(422, "the body is no JSON object")
    return value
