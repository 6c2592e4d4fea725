"""A server on a port, until it is told to stop: then it takes no more requests, and those it has finish."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from lorica.errors import ConfigError, LoricaError
from lorica.plain import visible
from lorica.serve.http.app import DRAIN, make_app
from lorica.serve.http.keys import Keys
from lorica.serve.http.served import Served

_KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than clients keep theirs (httpx, and OpenAI's with it,
5), who would else send on one that is just being closed."""

log = logging.getLogger("lorica.serve")


def check_open(host: str, keys: Keys, *, anonymous: bool) -> None:
    """Refuse to let everybody in unasked.

    Args:
        host: to listen on.
        keys: who may ask.
        anonymous: whether others than this machine may ask without a key.

    Raises:
        ConfigError: they could, and it was not said that they may.
    """
    if keys or anonymous or _is_this_machine(host):
        return
    raise ConfigError(
        f"{host} can be reached from other machines, and anyone there could use the model; give "
        "--api-key-file FILE, or --anonymous if that is meant"
    )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before a model is loaded for it.

    Args:
        host: to listen on.
        port: 0 takes one that is free.

    Raises:
        ConfigError: it is taken, or not for us.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"cannot listen on port {port}: ports are 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another with --port") from error


def run(
    here: Served,
    taken: socket.socket,
    *,
    drain: float = DRAIN,
    started: Callable[[], object] = lambda: None,
    beside: Callable[[Any], Any] = lambda app: app,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        here: the served model.
        taken: the socket, as `listen` gave it.
        drain: seconds that running requests have to finish in then.
        started: called once requests are answered.
        beside: makes an application of this one and others.

    Raises:
        LoricaError: the engine does not start.
    """
    config = uvicorn.Config(
        beside(make_app(here, drain=drain, started=started)),
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=int(drain),
    )
    server = uvicorn.Server(config)
    # Once all is over, uvicorn sends itself the signal again, whose handler would be the end of the process.
    mine = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: None) if mine else None
    try:
        server.run(sockets=[taken])
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)
    if not server.started:
        raise LoricaError("the server did not start; the lines above say why")


def log_to_stderr(level: int = logging.INFO) -> None:
    """Have the server's log on standard error: a line for each request, without its content."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(asctime)s %(levelname)s %(message)s"))
    for name, lowest in (("lorica", level), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(lowest)
        logger.addHandler(handler)


class _Visible(logging.Formatter):
    """Names that clients chose do not steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
