"""A server of a tiny model on loopback: in a thread, or as a process of its own to be killed."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from service.causal_models import llama

from lorica.service.engine.base import Base
from lorica.service.http import make_app
from lorica.service.state.service import Service
from lorica.service.state.tenants import Tenants

NAME = "tiny"
CLOSING = [("Connection", "close")]
"""The SDK leaves a connection open that nobody closes, and the suite takes a warning for an error."""


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(service: Service, port: int | None = None) -> Iterator[str]:
    """Serve it in a thread; gives the address."""
    port = free_port() if port is None else port
    config = uvicorn.Config(
        make_app(service), port=port, log_level="warning", timeout_graceful_shutdown=1, headers=CLOSING
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        service.close()


def service_in(folder: Path, tenants: Tenants | None = None, **settings: float) -> Service:
    """The service of a folder."""
    return Service(Base(llama(), NAME), folder, tenants, **settings)  # type: ignore[arg-type]


if __name__ == "__main__":
    where, at, every = sys.argv[1:]
    app = make_app(service_in(Path(where), snapshot=float(every)))
    uvicorn.run(app, port=int(at), log_level="error", headers=CLOSING)
