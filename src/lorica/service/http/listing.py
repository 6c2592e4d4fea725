"""Runs, sessions and checkpoints: listed, described, fetched, deleted."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse

from lorica.service.errors import GoneError
from lorica.service.http.answers import Route, body_of, json_of, service_of, tenant_of
from lorica.service.state.checkpoints import moment, time_to_live
from lorica.service.state.registry import Row
from lorica.service.state.service import Service

_HOUR = 3600
_Until = Annotated[int, Query(ge=0, le=1 << 40)]
_Count = Annotated[int, Query(ge=0, le=1 << 31)]

router = APIRouter(route_class=Route)


def _page(rows: Sequence[Any], limit: int, offset: int) -> tuple[Sequence[Any], dict[str, int]]:
    return rows[offset : offset + limit], {"offset": offset, "limit": limit, "total_count": len(rows)}


def _run(service: Service, row: Row) -> dict[str, Any]:
    listed = service.registry.all("checkpoints", run=row["id"], listed=1)
    newest = {kind: [c for c in listed if c["kind"] == kind] for kind in ("weights", "sampler_weights")}
    described = {
        kind: service.checkpoints.described(found[0]) if found else None for kind, found in newest.items()
    }
    return {
        "training_run_id": row["id"],
        "base_model": service.base.name,
        "model_owner": row["tenant"],
        "is_lora": True,
        "corrupted": False,
        "lora_rank": row["rank"],
        "last_request_time": moment(row["used"]),
        "last_checkpoint": described["weights"],
        "last_sampler_checkpoint": described["sampler_weights"],
        "user_metadata": row.about,
    }


@router.get("/training_runs")
def training_runs(request: Request, limit: _Count = 20, offset: _Count = 0) -> dict[str, Any]:
    """The tenant's runs, the newest first."""
    service = service_of(request)
    rows, cursor = _page(service.registry.all("runs", tenant=tenant_of(request).name), limit, offset)
    return {"training_runs": [_run(service, row) for row in rows], "cursor": cursor}


@router.get("/training_runs/{run}")
def training_run(request: Request, run: str) -> dict[str, Any]:
    """One run."""
    service = service_of(request)
    return _run(service, service.registry.one("runs", run, tenant_of(request).name))


@router.get("/training_runs/{run}/checkpoints")
def run_checkpoints(request: Request, run: str) -> dict[str, Any]:
    """A run's checkpoints, the newest first."""
    service, tenant = service_of(request), tenant_of(request)
    service.registry.one("runs", run, tenant.name)
    rows = service.registry.all("checkpoints", run=run, tenant=tenant.name, listed=1)
    return {"checkpoints": [service.checkpoints.described(row) for row in rows]}


@router.get("/checkpoints")
def checkpoints(request: Request, limit: _Count = 100, offset: _Count = 0) -> dict[str, Any]:
    """The tenant's checkpoints, the newest first."""
    service = service_of(request)
    found = service.registry.all("checkpoints", tenant=tenant_of(request).name, listed=1)
    rows, cursor = _page(found, limit, offset)
    return {"checkpoints": [service.checkpoints.described(row) for row in rows], "cursor": cursor}


def _checkpoint(request: Request, run: str, kind: str, name: str) -> Row:
    path = f"tinker://{run}/{kind}/{name}"
    return service_of(request).registry.one("checkpoints", path, tenant_of(request).name)


def _readable(request: Request, run: str, kind: str, name: str) -> Row:
    return service_of(request).registry.readable(f"tinker://{run}/{kind}/{name}", tenant_of(request).name)


_ONE = "/training_runs/{run}/checkpoints/{kind}/{name}"


@router.delete(_ONE)
def delete_checkpoint(request: Request, run: str, kind: str, name: str) -> dict[str, Any]:
    """A checkpoint is no more."""
    service_of(request).checkpoints.remove(_checkpoint(request, run, kind, name))
    return {}


@router.put(_ONE + "/ttl")
async def checkpoint_ttl(request: Request, run: str, kind: str, name: str) -> dict[str, Any]:
    """The life of a checkpoint."""
    row = _checkpoint(request, run, kind, name)
    ttl = time_to_live(json_of(await body_of(request)))
    expires = None if ttl is None else time.time() + ttl
    service_of(request).registry.change("checkpoints", row["path"], expires=expires)
    return {}


@router.get(_ONE + "/archive")
def archive(request: Request, run: str, kind: str, name: str) -> Response:
    """PEFT's files of a checkpoint, in a tar file."""
    data = service_of(request).checkpoints.archive(_readable(request, run, kind, name))
    disposition = {"Content-Disposition": f'attachment; filename="{name}.tar"'}
    return Response(data, media_type="application/x-tar", headers=disposition)


@router.get(_ONE + "/external_weights_urls")
def urls(request: Request, run: str, kind: str, name: str) -> dict[str, Any]:
    """An address for each of a checkpoint's files, good for an hour."""
    service, row = service_of(request), _readable(request, run, kind, name)
    until = int(time.time()) + _HOUR
    found = {}
    for file in service.checkpoints.files(row):
        sign = _sign(service, row["path"], file, until)
        here = f"{request.url.path.removesuffix('/external_weights_urls')}/files/{file}"
        found[file] = f"{str(request.base_url).rstrip('/')}{here}?until={until}&sign={sign}"
    return {"urls": found, "expires": moment(until)}


@router.get(_ONE + "/files/{file}")
def file(request: Request, run: str, kind: str, name: str, file: str, until: _Until, sign: str) -> Response:
    """One file, by an address that was given out."""
    service, path = service_of(request), f"tinker://{run}/{kind}/{name}"
    if until < time.time() or not hmac.compare_digest(
        _sign(service, path, file, until).encode(), sign.encode()
    ):
        raise HTTPException(403, "this address is not good, or no longer")
    found = service.checkpoints.files(service.registry.one("checkpoints", path)).get(file)
    if found is None:
        raise GoneError(f"{path} has no file {file!r}")
    return FileResponse(found)


def _sign(service: Service, path: str, file: str, until: int) -> str:
    return hmac.new(service.secret, f"{path}\n{file}\n{until}".encode(), hashlib.sha256).hexdigest()


@router.post("/weights_info")
async def weights_info(request: Request) -> dict[str, Any]:
    """The settings needed to continue from a checkpoint."""
    service, tenant = service_of(request), tenant_of(request)
    body = json_of(await body_of(request))
    row = service.registry.readable(str(body.get("tinker_path")), tenant.name)
    run = service.registry.one("runs", row["run"])
    made = json.loads(run["made"])
    sorts = {name: made.get(name) for name in ("train_unembed", "train_mlp", "train_attn")}
    return {"base_model": service.base.name, "is_lora": True, "lora_rank": run["rank"], **sorts}


@router.get("/sessions")
def sessions(request: Request, limit: _Count = 20, offset: _Count = 0) -> dict[str, Any]:
    """The tenant's sessions, the newest first."""
    found = service_of(request).registry.all("sessions", tenant=tenant_of(request).name)
    rows, _ = _page(found, limit, offset)
    return {"sessions": [row["id"] for row in rows]}


@router.get("/sessions/{session}")
def session(request: Request, session: str) -> dict[str, Any]:
    """One session: its runs and samplers."""
    registry = service_of(request).registry
    row = registry.one("sessions", session, tenant_of(request).name)
    about = row.about or {}
    return {
        "training_run_ids": [run["id"] for run in registry.all("runs", session=session)],
        "sampler_ids": [sampler["id"] for sampler in registry.all("samplers", session=session)],
        "user_metadata": about.get("user_metadata"),
        "display_name": about.get("display_name"),
    }
