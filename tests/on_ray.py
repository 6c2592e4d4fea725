"""Ray for tests, with no more processes than they need."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from lorica.train.system import preloaded_context, settle


@contextlib.contextmanager
def cluster(*, forked: bool = True) -> Iterator[None]:
    """Ray on two processors, started and joined by this process.

    Starting one costs five seconds of a processor, and waiting a fourteenth of one: each module has its own.

    Args:
        forked: fork its workers from one process that has imported torch, transformers and Ray; each that Ray
            starts imports them for eight seconds.
    """
    import ray

    # Its files are apart from those of another Ray; pytest's own folders are too long for its sockets.
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process, which watches for nothing here
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # on a busy machine it would be killed
        with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as theirs:
            theirs.setenv("TORCHDYNAMO_DISABLE", "1")  # else bitsandbytes imports a compiler
            if forked:
                stack.enter_context(_workers(f"{temporary}/workers"))
                theirs.setenv("LORICA_RAY_WORKERS", f"{temporary}/workers")
                theirs.setattr("ray._private.parameter.RayParams.update_if_absent", _with_our_worker)
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=80 * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=temporary,
            )
            theirs.undo()
            try:
                yield
            finally:
                ray.shutdown()


@contextlib.contextmanager
def _workers(address: str) -> Iterator[None]:
    """A process that forks a worker for whoever asks by `ray_worker`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        context: Any = preloaded_context()
        process = context.Process(target=_fork_workers, args=(listener,))
        with mock.patch.dict(sys.modules, __main__=ModuleType("__main__")):  # as in `ranks`
            process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _fork_workers(listener: socket.socket) -> None:
    settle()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none is waited for
    while True:
        asked, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            try:
                _work(asked)
            finally:
                os._exit(1)
        asked.close()


def _work(asked: socket.socket) -> None:
    """Be the worker that somebody asks for; its end closes `asked`."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    script = str(Path(spec.origin).parent / "_private" / "workers" / "default_worker.py")
    arguments, environment = json.load(asked.makefile())
    os.environ.clear()
    os.environ.update(environment)
    assert "ray" not in sys.modules, "which reads the worker's environment when it is imported"
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _with_our_worker(self: Any, **defaults: Any) -> None:
    """As Ray's method, which is asked for the paths of what it starts."""
    if "worker_path" in defaults:
        defaults["worker_path"] = str(Path(__file__).with_name("ray_worker.py"))
    for name, value in defaults.items():
        if getattr(self, name) is None:
            setattr(self, name, value)
