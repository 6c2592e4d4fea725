"""Writing small files so that they are there whole, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorica.checkpoint.atomic import replace_file
from lorica.errors import FileError
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
    """See that a file can be written, before what belongs in it is made.

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
