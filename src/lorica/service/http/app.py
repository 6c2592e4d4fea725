"""The training protocol's endpoints: as a router for a larger application, or as one of their own."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from lorica.service.http import listing, protocol, sharing
from lorica.service.state.service import Service

PREFIX = "/api/v1"


def make_router() -> APIRouter:
    """All endpoints, under `PREFIX`; the application that mounts it has the service as ``state.service``."""
    router = APIRouter(prefix=PREFIX)
    router.include_router(protocol.router)
    router.include_router(sharing.router)  # before what is asked for by any name
    router.include_router(listing.router)
    return router


def mount(app: FastAPI, service: Service) -> FastAPI:
    """Give an application these endpoints beside its own.

    Args:
        app: any; its other routes stay.
        service: it stays the caller's to close.
    """
    app.state.service = service
    app.include_router(make_router())
    return app


def beside(service: Service) -> Callable[[ASGIApp], ASGIApp]:
    """Give any application these endpoints, beside its own middleware.

    Args:
        service: it stays the caller's to close.
    """
    training = make_app(service)

    def joined(other: ASGIApp) -> ASGIApp:
        async def both(scope: Scope, receive: Receive, send: Send) -> None:
            ours = scope["type"] == "http" and scope["path"].startswith(f"{PREFIX}/")
            await (training if ours else other)(scope, receive, send)

        return both

    return joined


def make_app(service: Service) -> FastAPI:
    """An application of its own.

    Args:
        service: it stays the caller's to close.
    """
    return mount(FastAPI(title="lorica", docs_url=None, redoc_url=None, openapi_url=None), service)
