"""Atomic writing: a reader finds a whole file or none."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorica.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays until its user removes it
    fcntl = None

Writer = Callable[[Path], object]

_STAGE = ".writing-"


def replace_files(directory: Path, writers: Mapping[str, Writer], *, gone: Iterable[str] = ()) -> None:
    """Write several files that belong together into a folder.

    Each file is written under a temporary name first; then all are renamed. The folder does not load without
    the last file in `writers`: the old one is removed before any other is replaced, and the new one comes
    last. So an interruption leaves the old set, the new set, or a folder that does not load and names the
    missing file; never a mixture that loads.

    Args:
        directory: created if missing.
        writers: file name → function that writes that file's content to a given path.
        gone: names of files to remove, which do not belong to the new set.

    Raises:
        FileError: the folder cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with staged(directory) as stage:
            for name, write in writers.items():
                write(stage / name)
                (stage / name).chmod(usual_mode(stage))
                flush(stage / name)
            *_, key = writers
            for name in (key, *gone):
                (directory / name).unlink(missing_ok=True)
            for name in writers:
                (stage / name).replace(directory / name)
        flush(directory)
    except (OSError, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(
            f"cannot write to {directory}: {reason}; give a folder that can be written"
        ) from error


def replace_file(path: Path, write: Writer) -> None:
    """Write one file under a temporary name and rename it: a reader finds the old one or the new one.

    Args:
        path: of the file, in an existing folder.
        write: writes the content to a given path.

    Raises:
        OSError: it cannot be written.
    """
    with staged(path.parent) as stage:
        write(stage / path.name)
        (stage / path.name).chmod(usual_mode(stage))
        flush(stage / path.name)
        (stage / path.name).replace(path)


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary folder inside another; removed at the end, with those that killed processes left behind.

    Its writer holds a lock on it, which the system releases however the process ends.

    Raises:
        OSError: it cannot be made.
    """
    _sweep(directory)
    while True:
        stage = Path(tempfile.mkdtemp(dir=directory, prefix=_STAGE))
        handle = _lock(stage)
        if handle is not None:
            break  # else another process took it for abandoned before it was locked
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(handle)


def usual_mode(directory: Path) -> int:
    """A new file's permissions by the umask, read without changing it: other threads may be writing files."""
    probe = directory / f".mode-{os.getpid()}"
    handle = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()


def flush(path: Path) -> None:
    """Flush a file to the disk: its rename must not take effect before its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(directory: Path) -> None:
    for left in directory.glob(f"{_STAGE}*"):
        with contextlib.suppress(OSError):
            handle = _lock(left, ours=False)
            if handle is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)


def _lock(stage: Path, *, ours: bool = True) -> int | None:
    """Lock a folder; None if another process holds the lock, or the folder is gone.

    Args:
        stage: the folder.
        ours: whether this process made it; then it is used even where the file system has no locks.
    """
    try:
        handle = os.open(stage, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if fcntl is None:
            raise OSError
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), stage.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        if ours:
            return handle
    os.close(handle)
    return None


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors: as safetensors if the suffix says so, else in torch's pickled form.

    Args:
        path: of the file.
        tensors: contiguous, on the CPU, no two sharing memory.
        metadata: text for the header of safetensors.

    Raises:
        OSError: it cannot be written.
    """
    import safetensors.torch  # here, as most files that are written hold no tensors
    import torch

    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(dict(tensors), path, metadata=dict(metadata or {}) or None)
        else:
            # Pickling a view would write the whole storage.
            whole = {
                name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
                for name, t in tensors.items()
            }
            torch.save(whole, path)
    except (safetensors.SafetensorError, RuntimeError) as error:  # a full disk raises these too
        raise OSError(str(error)) from error
