"""The largest memory that a process took."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch


def peak_memory() -> int:
    """Largest memory so far in bytes: of torch's tensors on a GPU, of the whole process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        # What getrusage says on Linux is at least what the parent had when it started this process.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.findall(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
