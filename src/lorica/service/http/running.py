"""A server of the training protocol: in a thread of this process, or until it is told to stop."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from lorica.errors import FileError
from lorica.service.http.app import make_app
from lorica.service.state.service import Service


@contextmanager
def serving(service: Service, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve in a thread for as long as the block lasts; gives the address.

    Args:
        service: closed at the end.
        host: to listen at.
        port: likewise; 0 takes a free one.

    Raises:
        FileError: nobody can listen there.
    """
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        service.close()
        raise FileError(f"cannot listen at {host}:{port}: {error.strerror}; give another port") from error
    server = _server(make_app(service))
    given = {"sockets": [listener]}
    thread = threading.Thread(target=server.run, kwargs=given, name="lorica-http", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        service.close()


def run(service: Service, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGINT or SIGTERM; calls accepted and not done wait in the folder.

    Args:
        service: closed at the end.
        host: to listen at.
        port: likewise.
    """
    server = _server(make_app(service), host=host, port=port)
    try:
        asyncio.run(server.serve())
    finally:
        service.close()


def _server(app: FastAPI, **more: Any) -> uvicorn.Server:
    # Requests for results are held open: whoever stops does not wait for them.
    settings: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": 1, **more}
    return uvicorn.Server(uvicorn.Config(app, **settings))
