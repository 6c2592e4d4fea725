"""A fork server that is a fork of the process of tests, which has imported everything when it begins.

multiprocessing would start a fresh interpreter, which imports torch, transformers and lorica for six seconds,
once in each worker of pytest's. Here is all that knows what multiprocessing keeps of its server.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import warnings
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any

import jaxtyping


def start() -> None:
    """Start it, unless there is one; whoever asks multiprocessing for one finds it."""
    server: Any = forkserver._forkserver  # pyright: ignore[reportAttributeAccessIssue]
    if server._forkserver_pid is not None or not Path("/proc/self/fd").is_dir():
        return
    from lorica.train.system import _COMMON

    for name in _COMMON:
        importlib.import_module(name)
    resource_tracker.ensure_running()
    alive_r, alive_w = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # execnet's thread does not live on in the fork, and is not missed
        address = connection.arbitrary_address("AF_UNIX")  # pyright: ignore[reportAttributeAccessIssue]
        listener.bind(address)
        listener.listen()
        pid = os.fork()
        if pid == 0:
            _serve(listener.fileno(), alive_r)
    os.close(alive_r)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive_w, pid


def _serve(listener: int, alive: int) -> None:
    try:
        # What pytest talks through is its own: nobody should wait for a fork to close it. The numbers stay
        # taken, since objects that hold them write to them and close them.
        nothing = os.open(os.devnull, os.O_RDWR)
        keep = {0, 1, 2, listener, alive, resource_tracker.getfd(), nothing}
        for handle in {int(path.name) for path in Path("/proc/self/fd").iterdir()} - keep:
            os.dup2(nothing, handle, inheritable=False)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)
        jaxtyping.config.update("jaxtyping_disable", True)  # as in a process that was started
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as lorica's own is started
        forkserver.main(listener, alive, [])  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        os._exit(0)
