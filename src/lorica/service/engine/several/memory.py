"""Memory that processes share: mapped before they fork, filled as it is asked for.

arena    ┃ adapter 1 ┃ adapter 2 ┃ (given back) ┃ adapter 4 ┃ …      an address means the same in all of them
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import weakref

import torch
from torch import Tensor

_PAGE = 4096
_TIMES = 16  # addresses per byte of the machine's: those given back in other sizes are not joined
_NO_RESERVE = 0x4000  # of Linux: pages count once they are written to


class Arena:
    """Numbers that this process and those that it forks later all see."""

    def __init__(self) -> None:
        """Map addresses; no memory is used yet."""
        size = _TIMES * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        self._first = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        self._next, self._free = 0, dict[int, list[int]]()
        self._lock = threading.RLock()  # the garbage may be collected while it is held
        self._owner = os.getpid()

    def zeros(self, count: int) -> Tensor:
        """So many zeros in float32; their place is given back with the last tensor that looks at it."""
        size = max(1, -(-4 * count // _PAGE)) * _PAGE
        with self._lock:
            if left := self._free.get(size):
                at = left.pop()
            else:
                at = self._next
                self._next += size
        whole = memoryview(self._map)[at : at + size]
        weakref.finalize(whole, self._give_back, at, size).atexit = False
        return torch.frombuffer(whole, dtype=torch.float32, count=count)

    def place(self, tensor: Tensor) -> int:
        """By which `at` finds a tensor of `zeros` in another process."""
        return tensor.data_ptr() - self._first

    def at(self, place: int, count: int) -> Tensor:
        """The numbers at a place."""
        return torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=place)

    def _give_back(self, at: int, size: int) -> None:
        if os.getpid() != self._owner:
            return
        self._map.madvise(mmap.MADV_REMOVE, at, size)  # what comes next there finds zeros
        with self._lock:
            self._free.setdefault(size, []).append(at)


_MADE: list[Arena] = []


def can_fork() -> bool:
    """Whether engines can be processes: torch cannot be forked where it has threads for other devices."""
    return sys.platform == "linux" and not torch.accelerator.is_available()


def has_room() -> bool:
    """Whether there are addresses for the arena, which a limit on them (``ulimit -v``) may refuse."""
    try:
        arena()
    except OSError:
        return False
    return True


def arena() -> Arena:
    """The arena; from here on `zeros` takes its numbers there."""
    if not _MADE:
        _MADE.append(Arena())
    return _MADE[0]


def zeros(count: int, device: torch.device) -> Tensor:
    """Zeros in float32, where other processes see them if there are any."""
    if _MADE and device.type == "cpu":
        return _MADE[0].zeros(count)
    return torch.zeros(count, device=device)
