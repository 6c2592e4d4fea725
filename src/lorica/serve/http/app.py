"""The application: endpoints behind the gate, started and stopped with the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from lorica import __version__
from lorica.serve.http import errors
from lorica.serve.http.gate import Gate
from lorica.serve.http.routes import ROUTERS
from lorica.serve.http.served import Served

DRAIN = 300.0
"""Seconds that running requests have to finish in when the server stops."""

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    "400": "The request cannot be answered as it stands.",
    "401": "No valid key.",
    "403": "This key may not.",
    "404": "No such model.",
    "408": "The request did not arrive in time.",
    "413": "The request is too large.",
    "429": "Too many requests; Retry-After says when to come again.",
    "503": "The engine does not run.",
}


def make_app(here: Served, *, drain: float = DRAIN, started: Callable[[], object] = lambda: None) -> FastAPI:
    """The application of a served model.

    Args:
        here: the base, its engine, its keys and limits.
        drain: seconds that running requests have to finish in when the server stops.
        started: called once the engine runs.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await here.engine.start()
        here.closing = False
        started()
        try:
            yield
        finally:
            here.closing = True
            await here.engine.stop(drain=drain)
            here.texts.close()

    app = FastAPI(
        title="lorica",
        version=__version__,
        description="One base, many adapters: a request's `model` names which.",
        lifespan=life,
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
    )
    app.state.served = here
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app)
    app.add_middleware(Gate, keys=here.keys, settings=here.settings, metrics=here.metrics)
    describe = app.openapi
    app.openapi = lambda: _with_errors(describe())
    return app


def _with_errors(described: dict[str, Any]) -> dict[str, Any]:
    """A description in which every endpoint has our errors, and not FastAPI's 422."""
    schemas = described.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = _ERROR
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for methods in described["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            for status, text in _STATUSES.items():
                operation["responses"][status] = {"description": text, "content": content}
    return described
