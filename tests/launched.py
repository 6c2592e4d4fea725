"""Two processes, of a launcher or a pool, that do next to nothing, for tests of their ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lorica.train import system
from lorica.train.distributed.launch import launch
from lorica.train.settings import LaunchConfig


def launching(folder: Path) -> None:
    """Start two processes that tell that they are there, and wait."""
    system._COMMON = ["lorica.train.distributed.launch"]  # of a server of its own, which needs no more
    launch(waiting, (folder,), LaunchConfig(processes=2), "start it again")


def pooling(folder: Path) -> None:
    """The same in a pool."""
    system._COMMON = ["concurrent.futures.process"]
    with system.preloaded_pool(2) as pool:
        list(pool.map(waiting, [folder] * 2))


def waiting(folder: Path) -> int:
    """Tell it, wait for two minutes, and tell that nothing ended it."""
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(120)
    (folder / "went on").touch()
    return 0


def losing() -> int:
    """Lose the other one, which is still there, as gloo says it."""
    from lorica.train.distributed.group import OnAnother, joined, rank, wait_for_all

    try:
        with joined(cpu=True):
            wait_for_all()
            if rank() == 0:
                raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")
            time.sleep(120)
    except OnAnother:
        return 1
    return 0
