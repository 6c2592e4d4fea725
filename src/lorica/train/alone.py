"""One run in a folder at a time, by a lock that dies with its process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorica.errors import StateError
from lorica.train.files import writable_directory


@contextlib.contextmanager
def alone_in(folder: str | Path, what: str = "run") -> Iterator[Path]:
    """Keep a second run out of a folder: each would write over what the other has written.

    The folder is made if need be, and removed again if nothing came into it. The lock is the system's, on the
    folder itself: it leaves no file, and is gone however the process ends.

    Args:
        folder: where the run writes.
        what: what to call it in the error.

    Raises:
        FileError: the folder cannot be made or written to.
        StateError: another run is at work in it.
    """
    made = not Path(folder).exists()
    folder = writable_directory(folder)
    handle = _lock(folder)
    if handle is None:
        raise StateError(
            f"another {what} is at work in {folder}; wait until it has ended, or choose another folder"
        )
    try:
        yield folder
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
        os.close(handle)


def _lock(folder: Path) -> int | None:
    """An open file whose closing unlocks the folder; None where another process, or this one, holds it."""
    try:
        import fcntl
    except ImportError:  # Windows, which has no handles of folders
        import msvcrt

        lock: Any = msvcrt
        return _first(folder / ".lock", lambda handle: lock.locking(handle, lock.LK_NBLCK, 1))

    def take(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    try:
        return _first(folder, take)
    except OSError:  # network file systems lock only what is open for writing
        return _first(folder / ".lock", take)


def _first(path: Path, take: Callable[[int], None]) -> int | None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        take(handle)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError | PermissionError):
            return None
        raise
    return handle
