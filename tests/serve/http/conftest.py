"""A server on a port of this machine, in a thread, over an engine that is given."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import uvicorn
from endpoints import StandIn

from lorica.serve.http import Served, make_app


@contextlib.contextmanager
def listening(served: Served) -> Iterator[str]:
    """Serve until the block ends; gives the address."""
    config = uvicorn.Config(make_app(served, drain=2), port=0, log_config=None, lifespan="on", ws="none")
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        sockets[0].close()
        assert not thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[[Served], str]]:
    """Starts servers that end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda served: stack.enter_context(listening(served))


@pytest.fixture(scope="module")
def serve_long() -> Iterator[Callable[[Served], str]]:
    """Starts servers that end with the file."""
    with contextlib.ExitStack() as stack:
        yield lambda served: stack.enter_context(listening(served))


@pytest.fixture
def engine() -> StandIn:
    return StandIn()


@pytest.fixture
def url(serve: Callable[[Served], str], engine: StandIn) -> Any:
    """The address of a server of a base named ``base`` over the stand-in."""
    return serve(Served("base", engine))
