"""A launcher with two processes that do nothing, for tests of how they end; it imports little."""

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


def waiting(folder: Path) -> int:
    """Tell it, and wait for two minutes."""
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(120)
    return 0
