"""Checkpoints published and copied, sessions searched and labelled; and what this server has nothing of."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse

from lorica.service.errors import UserError
from lorica.service.http.answers import Route, body_of, json_of, service_of, tenant_of
from lorica.service.state.checkpoints import moment
from lorica.service.state.registry import Registry, Row

router = APIRouter(route_class=Route)

_REFUSED = {
    "/sessions/{session}/trace_export": "traces of sessions",
    "/audit": "an audit log",
    "/billing/usage/events": "billing",
    "/billing/usage/checkpoints/current": "billing",
    "/retrieve_futures": "one poll for all of a sampler's futures",
    "/join_sampling_session": "numbered clones of a sampler",
    "/auth/token": "tokens in exchange for keys",
}


def _refuse(path: str, what: str) -> None:
    @router.api_route(path, methods=["GET", "POST"], name=what)
    async def refused(request: Request) -> JSONResponse:
        tenant_of(request)
        return JSONResponse({"detail": f"this server does not carry {what}"}, 422)


for _path, _what in _REFUSED.items():
    _refuse(_path, _what)


@router.api_route(
    "/training_runs/{run}/checkpoints/{kind}/{name}/publish", methods=["POST", "DELETE"], name="publish"
)
def publish(request: Request, run: str, kind: str, name: str) -> dict[str, Any]:
    """Everybody may read a checkpoint, or its owner alone again."""
    registry, path = service_of(request).registry, f"tinker://{run}/{kind}/{name}"
    registry.one("checkpoints", path, tenant_of(request).name)
    registry.change("checkpoints", path, public=int(request.method == "POST"))
    return {}


@router.post("/copy_weights")
async def copy_weights(request: Request) -> dict[str, Any]:
    """A checkpoint once more, in a run that cannot be trained; the files are shared."""
    service, tenant = service_of(request), tenant_of(request)
    body = json_of(await body_of(request))
    if {body.get("weights_access_token"), request.headers.get("x-tinker-weights-access-token")} != {None}:
        raise UserError("weights_access_token is not carried by this server; publish the checkpoint")
    source = service.registry.readable(str(body.get("source_path")), tenant.name)
    session, seq = body.get("session_id"), body.get("model_seq_id", 0)
    if not isinstance(seq, int) or not isinstance(session, str | None):
        raise HTTPException(422, "model_seq_id must be int, and session_id str")
    if session is None:
        # Asked again with the same key it is the same copy.
        key = request.headers.get("x-idempotency-key") or uuid.uuid4().hex
        session, now = uuid.uuid5(uuid.NAMESPACE_OID, f"{tenant.name}\n{key}").hex, time.time()
        about = {"project_id": body.get("destination_project_id")}
        service.registry.add(
            "sessions", id=session, tenant=tenant.name, created=now, seen=now, ended=1, about=about
        )
    service.registry.one("sessions", session, tenant.name)
    copied = await run_sync(service.checkpoints.copy, source, tenant, f"{session}:train:{seq}", body)
    return {"tinker_path": copied["path"]}


@router.put("/sessions/{session}/project")
async def project(request: Request, session: str) -> dict[str, Any]:
    """Label a session; a project is a name here, and gives nobody anything."""
    registry = service_of(request).registry
    row = registry.one("sessions", session, tenant_of(request).name)
    label = json_of(await body_of(request)).get("project_id")
    if not isinstance(label, str):
        raise HTTPException(422, "project_id must be str")
    registry.change("sessions", session, about=json.dumps({**(row.about or {}), "project_id": label}))
    return {}


@router.post("/sessions/search")
async def search(request: Request) -> dict[str, Any]:
    """The tenant's sessions of some sort, the newest first."""
    registry, asked = service_of(request).registry, json_of(await body_of(request))
    limit, cursor = asked.get("limit", 50), asked.get("cursor")
    if not isinstance(limit, int) or not 1 <= limit <= 200:
        raise HTTPException(422, "limit must be 1 to 200")
    found = registry.all("sessions", tenant=tenant_of(request).name)
    try:
        found = [row for row in found if _meant(row, asked)]
        if cursor is not None:
            ids = [row["id"] for row in found]
            found = found[ids.index(cursor["last_session_id"]) + 1 :]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise HTTPException(422, f"this is no search of sessions: {error!r}") from None
    page = found[:limit]
    more = len(found) > limit
    last = (
        {"last_created_at": moment(page[-1]["created"]), "last_session_id": page[-1]["id"]} if more else None
    )
    return {"sessions": [_summary(registry, row) for row in page], "next_cursor": last}


def _meant(row: Row, asked: dict[str, Any]) -> bool:
    about = row.about or {}
    name, wanted = (about.get("display_name") or "").lower(), asked.get("display_name")
    given = [row["id"] == asked["session_id"]] if asked.get("session_id") is not None else []
    given += [all(word in name for word in wanted.lower().split())] if wanted is not None else []
    labels = about.get("user_metadata") or {}
    kinds = asked.get("statuses")
    return (
        (not given or any(given))
        and all(labels.get(key) == value for key, value in (asked.get("user_metadata") or {}).items())
        and (asked.get("project_ids") is None or about.get("project_id") in asked["project_ids"])
        and (kinds is None or (not row["ended"] and any(kind["type"] == "active" for kind in kinds)))
    )


def _summary(registry: Registry, row: Row) -> dict[str, Any]:
    about = row.about or {}
    runs = {run["id"] for run in registry.all("runs", session=row["id"])}
    sizes = [c["size"] for run in runs for c in registry.all("checkpoints", run=run, listed=1)]
    return {
        "session_id": row["id"],
        "created_at": moment(row["created"]),
        "owner": row["tenant"],
        "project_id": about.get("project_id") or "",
        "status": None if row["ended"] else {"type": "active"},
        "checkpoints_count": len(sizes),
        "display_name": about.get("display_name"),
        "user_metadata": about.get("user_metadata"),
        "checkpoint_storage_bytes": sum(sizes),
    }
