"""What a run rests on: fingerprints of rows and models on disk."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


def fingerprint(source: str) -> str:
    """What a path holds, by its content; a name that is no path stands for itself.

    Moved rows are the same rows; rewritten ones are not.
    """
    place, mark, split = source.partition("#")
    path = Path(place).expanduser()
    if not path.exists():
        return source
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    names = [file.name if path.is_file() else str(file.relative_to(path)) for file in files]
    # A renamed file is the same, but what decides how it is read is the end of its name.
    names = ["".join(path.suffixes)] if path.is_file() else names
    return _digest(stamps, tuple(names)) + mark + split


@functools.cache
def _digest(stamps: tuple[tuple[str, int, int], ...], names: tuple[str, ...]) -> str:
    whole = hashlib.sha256()
    for (file, _, _), name in zip(stamps, names, strict=True):
        with open(file, "rb") as content:  # noqa: PTH123
            whole.update(f"{name}:{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{whole.hexdigest()}"
