"""Sessions, models, training, sampling, and the futures through which all of them answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from functools import partial
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from lorica.service import wire
from lorica.service.engine.drawing import MOST_SAMPLES
from lorica.service.errors import GoneError, UserError
from lorica.service.http.answers import Route, body_of, json_of, service_of, tenant_of
from lorica.service.state.calls import check_base
from lorica.service.state.tenants import Tenant

POLL = 20.0
"""Seconds for which a request for a result is held open."""

_ABOUT = ("tags", "user_metadata", "display_name", "sdk_version", "project_id")

router = APIRouter(route_class=Route)


async def _given(request: Request) -> tuple[Tenant, dict[str, Any]]:
    return tenant_of(request), json_of(await body_of(request))


def _field(body: dict[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise HTTPException(422, f"{name} must be {kind.__name__}, not {value!r}")
    return value


@router.get("/healthz")
async def healthz(request: Request) -> Response:
    """Whether the engine is alive."""
    alive = service_of(request).engine.alive
    return JSONResponse({"status": "ok" if alive else "down"}, 200 if alive else 503)


@router.get("/get_server_capabilities")
async def capabilities(request: Request) -> dict[str, Any]:
    """The base."""
    tenant_of(request)
    base = service_of(request).base
    model = {
        "model_name": base.name,
        "max_context_length": base.context,
        "trainable": True,
        "sampleable": True,
    }
    return {"supported_models": [model]}


@router.post("/client/config")
@router.post("/client/dynamic_config")
async def config(request: Request) -> Response:
    """The SDK's flags: all as they are by themselves, but bodies are packed."""
    tenant_of(request)
    # It asks by a connection that it makes for this alone, and never closes.
    flags = {"proto_compress_fwdbwd": True, "sample_cancel_enabled": True}
    return JSONResponse(flags, headers={"Connection": "close"})


@router.post("/telemetry")
async def telemetry(request: Request) -> dict[str, str]:
    """Taken, and dropped."""
    await body_of(request)
    return {"status": "accepted"}


@router.post("/create_session")
async def create_session(request: Request) -> dict[str, Any]:
    """A session; it lives by its heartbeats."""
    tenant, body = await _given(request)
    about = {name: body.get(name) for name in _ABOUT}
    session = await run_sync(service_of(request).create_session, tenant, about)
    return {"type": "create_session", "session_id": session}


@router.post("/session_heartbeat")
async def heartbeat(request: Request) -> dict[str, Any]:
    """The client is there still."""
    tenant, body = await _given(request)
    await run_sync(service_of(request).heartbeat, tenant, _field(body, "session_id", str))
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session}/finish")
async def finish(request: Request, session: str) -> dict[str, Any]:
    """The session is over."""
    await run_sync(service_of(request).finish_session, tenant_of(request), session)
    return {}


async def _accept(
    request: Request, tenant: Tenant, target: str, seq: int, kind: str, body: bytes | dict[str, Any]
) -> dict[str, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    call = await run_sync(partial(service_of(request).accept, tenant, target, seq, kind, data))
    return {"request_id": call}


@router.post("/create_model")
async def create_model(request: Request) -> dict[str, Any]:
    """A new adapter."""
    tenant, body = await _given(request)
    session, seq = _field(body, "session_id", str), _field(body, "model_seq_id", int)
    future = await _accept(request, tenant, session, seq, "create", body)
    return {**future, "model_id": f"{session}:train:{seq}"}


@router.post("/load_weights")
async def load_weights(request: Request) -> dict[str, Any]:
    """A checkpoint's weights into a run, or a new run that begins with them."""
    tenant, body = await _given(request)
    _field(body, "path", str)
    if body.get("session_id") is None:
        return await _of_run(request, tenant, body, "load")
    session, seq = _field(body, "session_id", str), _field(body, "model_seq_id", int)
    future = await _accept(request, tenant, session, seq, "create", body)
    return {**future, "model_id": f"{session}:train:{seq}"}


async def _of_run(request: Request, tenant: Tenant, body: dict[str, Any], kind: str) -> dict[str, Any]:
    run, seq = _field(body, "model_id", str), _field(body, "seq_id", int)
    return {**await _accept(request, tenant, run, seq, kind, body), "model_id": run}


def _endpoint(path: str, kind: str) -> None:
    @router.post(path, name=kind)
    async def call(request: Request) -> dict[str, Any]:
        tenant, body = await _given(request)
        return await _of_run(request, tenant, body, kind)


for _path, _kind in (
    ("/optim_step", "step"),
    ("/save_weights", "save"),
    ("/save_weights_for_sampler", "publish"),
    ("/save_weights_external", "export"),
):
    _endpoint(_path, _kind)


@router.post("/unload_model")
async def unload_model(request: Request) -> dict[str, Any]:
    """An adapter leaves the server; its checkpoints stay."""
    tenant, body = await _given(request)
    run = _field(body, "model_id", str)
    call = await run_sync(service_of(request).unload, tenant, run)
    return {"request_id": call, "model_id": run}


@router.post("/forward_backward")
@router.post("/forward")
async def forward_backward(request: Request) -> dict[str, Any]:
    """Losses, and gradients unless ``forward_only``."""
    tenant, body = tenant_of(request), await body_of(request)
    if "protobuf" not in request.headers.get("content-type", ""):
        body = wire.learn_of(json_of(body), forward_only=request.url.path.endswith("/forward"))
    learn = wire.Learn(body)
    _spend(request, tenant, learn.tokens)
    future = await _accept(request, tenant, learn.model_id, learn.seq_id, "learn", body)
    return {**future, "model_id": learn.model_id}


def _spend(request: Request, tenant: Tenant, tokens: int) -> None:
    wait = service_of(request).tenants.spend(tenant, tokens)
    if wait:
        raise HTTPException(
            429,
            f"{tenant.name!r} may use {tenant.tokens:,} tokens a minute; try again in {wait:.0f} s",
            {"Retry-After": f"{wait:.0f}"},
        )


@router.post("/create_custom_loss")
async def create_custom_loss(request: Request) -> Response:
    """Losses of a client's own run at the client."""
    tenant_of(request)
    return JSONResponse(
        {"detail": "custom losses on the server are not carried; forward_backward_custom computes them"}, 422
    )


@router.post("/get_info")
async def get_info(request: Request) -> dict[str, Any]:
    """A run's settings."""
    tenant, body = await _given(request)
    service = service_of(request)
    row = await run_sync(service.registry.one, "runs", _field(body, "model_id", str), tenant.name)
    base = service.base
    data = {"arch": type(base.model).__name__, "model_name": base.name, "tokenizer_id": base.tokenizer_id}
    return {
        "type": "get_info",
        "model_data": data,
        "model_id": row["id"],
        "is_lora": True,
        "lora_rank": row["rank"],
        "model_name": base.name,
    }


@router.post("/create_sampling_session")
async def create_sampling_session(request: Request) -> dict[str, Any]:
    """Sampling from a checkpoint, or from the base."""
    tenant, body = await _given(request)
    path = body.get("model_path")
    service = service_of(request)
    if path is None:
        check_base(body.get("base_model"), service.base)
    seq = _field(body, "sampling_session_seq_id", int)
    sampler = await run_sync(service.create_sampler, tenant, _field(body, "session_id", str), seq, path)
    return {"type": "create_sampling_session", "sampling_session_id": sampler}


@router.get("/samplers/{sampler}")
async def sampler(request: Request, sampler: str) -> dict[str, Any]:
    """The model of a sampling session."""
    service = service_of(request)
    row = await run_sync(service.registry.one, "samplers", sampler, tenant_of(request).name)
    return {"sampler_id": sampler, "base_model": service.base.name, "model_path": row["path"]}


@router.post("/asample")
async def asample(request: Request) -> dict[str, Any]:
    """Samples."""
    tenant, body = await _given(request)
    target, seq = body.get("sampling_session_id"), body.get("seq_id")
    if target is None:
        target, seq = f"direct:{secrets.token_hex(8)}", 0
    else:
        target, seq = _field(body, "sampling_session_id", str), _field(body, "seq_id", int)
    count = 1
    with contextlib.suppress(UserError):  # the future says what is wrong
        prompt, draw = wire.prompt_of(body), wire.draw_of(body, 0)
        if 1 <= draw.num_samples <= MOST_SAMPLES:
            count = draw.num_samples
            _spend(request, tenant, len(prompt) + count * max(draw.max_tokens or 0, 0))
    future = await _accept(request, tenant, target, seq, "sample", body)
    return {**future, "sample_sequence_ids": [f"{future['request_id']}:{i}" for i in range(count)]}


@router.post("/cancel_future")
async def cancel_future(request: Request) -> dict[str, Any]:
    """Nobody waits for these samples any more."""
    tenant, body = await _given(request)
    await run_sync(service_of(request).cancel, tenant, _field(body, "request_id", str))
    return {}


@router.post("/retrieve_future")
async def retrieve_future(request: Request) -> Response:
    """The result of a call; held open for a while where there is none yet."""
    tenant, body = await _given(request)
    call_id = _field(body, "request_id", str)
    service = service_of(request)
    try:
        promise = await run_sync(service.promise, tenant, call_id)
        if promise is not None:
            waiting = asyncio.wrap_future(promise)
            await asyncio.wait([waiting], timeout=POLL)
        call = await run_sync(service.result, tenant, call_id)
    except GoneError as error:
        return JSONResponse({"detail": str(error)}, 410)
    if call.result is None:
        pending = {"type": "try_again", "request_id": call_id, "queue_state": "active"}
        return JSONResponse(pending, 408 if service.engine.alive else 503)
    if call.failed is not None:
        return JSONResponse({"error": call.result.decode(), "category": call.failed})
    if call.kind in ("learn", "sample"):
        return Response(call.result, media_type="application/x-protobuf")
    return Response(call.result, media_type="application/json")
