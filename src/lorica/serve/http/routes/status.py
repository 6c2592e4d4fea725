"""`/health`, `/ready`, `/version`, `/metrics`, `/stats`; and the page at `/`."""

from __future__ import annotations

import dataclasses
import time
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from lorica import __version__
from lorica.serve.encoder.engine import EncoderEngine
from lorica.serve.http.errors import ApiError
from lorica.serve.http.metrics import CONTENT_TYPE
from lorica.serve.http.served import about, key_of, served

router = APIRouter(tags=["status"])

# The page is one file, and neither loads nor sends anything elsewhere.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the engine lives."""
    if not served(request).engine.alive:
        raise ApiError(503, "the engine does not run", code="engine_down", retry_after=10)
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether it is worth sending requests here: the engine lives, its queue has room, the server goes on."""
    here = served(request)
    if here.closing or not here.engine.alive:
        raise ApiError(503, "the server is shutting down, or its engine does not run", code="not_ready")
    if here.stats.waiting >= here.limits.queue:
        raise ApiError(503, "the queue is full", code="not_ready", retry_after=1)
    return JSONResponse({"status": "ready"})


@router.get("/version")
async def version() -> Response:
    """Lorica's version."""
    return JSONResponse({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counts and durations for Prometheus."""
    return Response(served(request).metrics.text(), media_type=CONTENT_TYPE)


@router.get("/stats")
async def stats(request: Request) -> Response:
    """The numbers of the page: the engine's counts, throughput, and every adapter that the key may use."""
    here, key = served(request), key_of(request)
    counts = dataclasses.asdict(here.stats)
    hidden = {entry.name for entry in here.adapters.entries() if not key.may_use(entry.name)}
    for name in ("mounted", "running_adapters", "waiting_adapters"):
        counts[name] = sorted(set(counts[name]) - hidden)
    reads = isinstance(here.engine, EncoderEngine)
    adapters: list[dict[str, Any]] = [
        {"id": entry.name, **about(entry), "kind": here.engine.kind(entry.name)}
        if isinstance(here.engine, EncoderEngine)
        else {"id": entry.name, **about(entry)}
        for entry in here.seen_by(key)
    ]
    return JSONResponse(
        {
            "model": here.model,
            "default": here.default,
            "writes": not reads,
            "chats": not reads and bool(getattr(here.texts.tokenizer, "chat_template", None)),
            "kind": here.engine.kind(None) if isinstance(here.engine, EncoderEngine) else None,
            "max_model_len": here.limits.context,
            "uptime": time.time() - here.metrics.begun,
            "version": __version__,
            **here.metrics.throughput(),
            "engine": counts,
            "adapters": adapters,
        }
    )


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page to try adapters on."""
    text = resources.files("lorica.serve.http").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"})


@router.get("/favicon.ico", include_in_schema=False)
async def icon() -> Response:
    """None; the page brings its own."""
    return Response(status_code=204)
