"""Anonymous memory of this process, and how a merge on disk makes it grow.

A module of its own, for a child process must be able to import what it is to run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorica.checkpoint import stream

STATUS = Path("/proc/self/status")


def report_growth(base: Path, source: Path, out: Path, pipe: Any) -> None:
    """Merge, and send by how much anonymous memory grew at most."""
    before = anonymous()
    most = 0

    def look(*_: int) -> None:
        nonlocal most
        most = max(most, anonymous() - before)

    stream.merge(base, source, out, progress=look)
    pipe.send(most)


def anonymous() -> int:
    """Bytes of anonymous memory, as Linux counts them."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10
