"""Two processes that do nothing, of a launcher or of a pool, for tests of how they end; it imports little."""

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
