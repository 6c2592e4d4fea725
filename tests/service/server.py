"""A server of a tiny model on loopback: in a thread, or as a process of its own to be killed."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import uvicorn
from service.causal_models import llama

from lorica.service.engine.base import Base
from lorica.service.http import make_app
from lorica.service.state.service import Service
from lorica.service.state.tenants import Tenants

NAME = "tiny"


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def service_in(folder: Path, tenants: Tenants | None = None, **settings: float) -> Service:
    """The service of a folder, with two engines."""
    return Service(Base(llama(), NAME), folder, tenants, engines=2, **settings)  # type: ignore[arg-type]


if __name__ == "__main__":
    where, at, every = sys.argv[1:]
    folder, pid = Path(where), 1
    while pid:  # when a server is gone, the next one
        pid = os.fork()
        if pid:
            folder.joinpath("pid.new").write_text(f"{pid}")
            folder.joinpath("pid.new").replace(folder / "pid")
            os.waitpid(pid, 0)
    app = make_app(service_in(folder, snapshot=float(every)))
    uvicorn.run(app, port=int(at), log_level="error")
