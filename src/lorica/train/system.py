"""Files that are there whole or not at all, a lock on a folder, a process for a piece of work, its memory."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import gc
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lorica.checkpoint.atomic import replace_file
from lorica.errors import FileError, StateError
from lorica.plain import as_json


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name in its own folder, then rename it into place."""
    content = text.encode()
    replace_file(path, lambda place: place.write_bytes(content))


def write_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, all or none.

    Raises:
        FileError: the file cannot be written.
    """
    try:
        write_atomically(Path(path), "".join(as_json(row, indent=None) + "\n" for row in rows))
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def writable_directory(path: str | Path) -> Path:
    """Make a folder if need be, and see that it can be written to, before hours of work depend on it.

    Raises:
        FileError: it cannot be made, is not a folder, or refuses a file.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"cannot write to {path}: {reason}; choose another folder") from error
    return path


def writable_file(path: str | Path) -> Path:
    """See that a file can be written, before its content is made.

    Raises:
        FileError: its folder is missing or refuses a file, or it is a folder itself.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def bytes_of(path: Path) -> int:
    """Size in bytes of a file, or of all files under a folder."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def alone_in(folder: str | Path, what: str = "run") -> Iterator[Path]:
    """Keep a second run out of a folder, where it would overwrite the first one's files.

    The folder is made if need be, and removed again if nothing came into it. The lock is the system's, on the
    folder itself: it leaves no file, and is gone however the process ends.

    Args:
        folder: where the run writes.
        what: its name in errors.

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


P = ParamSpec("P")

T = TypeVar("T")

# Modules that every run imports, which takes most of its seconds before the first step.
_COMMON = ["lorica.train.run", "transformers.trainer", "datasets", "sklearn.metrics", "scipy.stats"]


def in_new_process(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Call a function in a fresh process, and wait for its result.

    The process has imported modules and none of this one's data; it ends when this one ends.

    Args:
        work: the function, at the top of a module.
        arguments: its arguments; they and the result are pickled.
        named: as `arguments`.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process was killed.
    """
    with preloaded_pool(1) as pool:
        return pool.submit(work, *arguments, **named).result()


def preloaded_pool(processes: int) -> ProcessPoolExecutor:
    """A pool of processes of `preloaded_context`, which end when this one ends."""
    return ProcessPoolExecutor(processes, preloaded_context(), _settle_or_end)


def _settle_or_end() -> None:
    try:
        settle()
    except KeyboardInterrupt:  # of which the pool would log a traceback
        os._exit(1)


def preloaded_context() -> BaseContext:
    """A context whose processes do not inherit this one's memory, as forked ones would.

    Where there is a fork server, it has imported once what each of them needs. A terminal's Ctrl-C would
    end it, so it holds interrupts back; its processes take them once they `settle`.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_COMMON)
    resource_tracker.ensure_running()  # which would let interrupts in again, were it started with the server
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _end_server_at_exit(os.getpid())
    return context


@functools.cache
def _end_server_at_exit(owner: int) -> None:
    """End the fork server with its process, which may be interrupted while the server still imports."""

    def end() -> None:
        server = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
        if server is not None and os.getpid() == owner:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, signal.SIGTERM)

    atexit.register(end)


def settle() -> None:
    """The first act of a process of `preloaded_context`: from here on it ends with its parent, and on Ctrl-C.

    Raises:
        KeyboardInterrupt: the user pressed it before.
    """
    gc.freeze()  # what the fork server has imported: walking it would copy its memory into this process
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def peak_memory() -> int:
    """Largest memory so far in bytes: of torch's tensors on a GPU, of the whole process elsewhere."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        # On Linux getrusage tells at least the memory that the parent had when it started this process.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.findall(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
