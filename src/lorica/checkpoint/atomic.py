"""Writing files so that a reader finds the whole of one or none of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lorica.errors import FileError

Writer = Callable[[Path], None]


def replace_files(directory: Path, writers: Mapping[str, Writer], *, gone: Iterable[str] = ()) -> None:
    """Write several files that belong together into a folder.

    All are written beside their places first, and then renamed. The last one named is the key without which
    the folder does not load: an old one is taken away before the first is replaced, and the new one comes
    last. So an interruption at any moment leaves the old set, the new set, or a folder that says what it
    lacks; never a mixture that loads.

    Args:
        directory: made if it is not there.
        writers: file name → function that writes that file's content to a given path.
        gone: names of files that do not belong to the new set, to be removed if they are there.

    Raises:
        FileError: the folder cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as stage:
            for name, write in writers.items():
                write(Path(stage) / name)
                flush(Path(stage) / name)
            *_, key = writers
            for name in (key, *gone):
                (directory / name).unlink(missing_ok=True)
            for name in writers:
                (Path(stage) / name).replace(directory / name)
        flush(directory)
    except OSError as error:
        raise FileError(
            f"cannot write to {directory}: {error.strerror or error}; give a folder that can be written"
        ) from error


def flush(path: Path) -> None:
    """Have the disk hold what was written: a rename must not overtake its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
