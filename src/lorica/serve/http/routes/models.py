"""`/v1/models`, and loading and unloading adapters under vLLM's names."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from lorica.serve.engine import Entry, RefusedAdapter, UnknownAdapter
from lorica.serve.http.errors import ApiError, refused
from lorica.serve.http.schemas import LoadAdapter, UnloadAdapter
from lorica.serve.http.served import Served, about, key_of, served

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The base, and every adapter that the key may use."""
    here = served(request)
    entries = here.seen_by(key_of(request))
    return JSONResponse(
        {"object": "list", "data": [_card(here, None), *(_card(here, each) for each in entries)]}
    )


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One of them."""
    here = served(request)
    entry = here.entry(name, key_of(request))
    tag = {"ETag": f'"{entry.hash}"'} if entry is not None and entry.hash else None
    return JSONResponse(_card(here, entry), headers=tag)


def _card(here: Served, entry: Entry | None) -> dict[str, Any]:
    """The object of the base (None) or of an adapter."""
    loaded = entry.loaded if entry is not None else None
    card = {
        "id": here.model if entry is None else entry.name,
        "object": "model",
        "created": int(loaded or here.created),
        "owned_by": "lorica",
        "root": here.model if entry is None else str(entry.path or entry.name),
        "parent": None if entry is None else here.model,
        "max_model_len": here.limits.context,
    }
    return card if entry is None else {**card, **about(entry)}


@router.post("/v1/load_lora_adapter")
async def load(request: Request, body: LoadAdapter) -> Response:
    """Read an adapter from a folder under one of the server's roots."""
    here = _allowed(request)
    if body.lora_name == here.model:
        raise refused(f"{body.lora_name!r} is the base's name", "lora_name")
    begun = time.perf_counter()
    try:
        await here.adapters.load(
            body.lora_name, body.lora_path, pin=bool(body.pinned), replace=bool(body.load_inplace)
        )
    except UnknownAdapter as error:
        raise ApiError(404, str(error), param="lora_path", code="not_found") from None
    except RefusedAdapter as error:
        raise refused(str(error), "lora_name", "adapter_refused") from None
    here.metrics.loaded(time.perf_counter() - begun)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload(request: Request, body: UnloadAdapter) -> Response:
    """Stop serving an adapter; requests that use it finish."""
    here = _allowed(request)
    try:
        await here.adapters.unload(body.lora_name)
    except UnknownAdapter as error:
        raise ApiError(404, str(error), param="lora_name", code="model_not_found") from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _allowed(request: Request) -> Served:
    here = served(request)
    if not here.settings.allow_load:
        raise ApiError(
            403, "loading over HTTP is off; the server was started without --allow-load", code="not_allowed"
        )
    if not key_of(request).admin:
        raise ApiError(
            403, "this key may not load or unload adapters; one marked admin may", code="not_allowed"
        )
    return here
