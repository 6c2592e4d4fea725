"""Ray for tests, with no more processes than they need."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Ray on two processors, started and joined by this process.

    Starting one costs five seconds of a processor, and waiting a fourteenth of one: each module has its own.
    """
    import ray

    # Its files are apart from those of another Ray; pytest's own folders are too long for its sockets.
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process, which watches for nothing here
        with pytest.MonkeyPatch.context() as theirs:
            theirs.setenv("TORCHDYNAMO_DISABLE", "1")  # else bitsandbytes imports a compiler
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=80 * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=temporary,
            )
        try:
            yield
        finally:
            ray.shutdown()
