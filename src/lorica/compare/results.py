"""Finished runs, one JSON line per run, by which a comparison resumes; and the fingerprints of runs."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from pathlib import Path
from typing import Any

from lorica.errors import ConfigError, FileError, listing
from lorica.plain import as_json, plain
from lorica.reading import parse_json

Row = dict[str, Any]


class Results:
    """The file of results.

    Lines are only appended, and each is on the disk before the next run starts. A line cut off by a kill is
    skipped.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path = path
        self.rows: dict[str, Row] = {}
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}") from error
        for line in text.split("\n"):
            try:
                row = parse_json(line, f"a line of {path}")
            except FileError:
                continue
            if _is_whole(row):
                self.rows[row["key"]] = row
        self._cut = bool(text) and not text.endswith("\n")

    def __contains__(self, key: str) -> bool:
        """Whether a run is done."""
        return key in self.rows

    def get(self, key: str) -> Row | None:
        """A finished run's line, or None."""
        return self.rows.get(key)

    def add(self, row: Row) -> None:
        """Write a run's line."""
        row = plain(row)
        # What follows a line without an end would become part of it.
        text = ("\n" if self._cut else "") + as_json(row, indent=None) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._cut = False
        self.rows[row["key"]] = row


def _is_whole(row: Any) -> bool:
    """Whether a line has the fields that a table needs."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        return False
    scores = row.get("scores")
    return isinstance(scores, dict) and all(
        isinstance(found, dict) and all(isinstance(v, int | float | None) for v in found.values())
        for found in scores.values()
    )


def score_of(row: Row, split: str, metric: str) -> float | None:
    """A run's score; None if it is not a number, because the run diverged.

    Raises:
        ConfigError: there is no such metric.
    """
    scores = row["scores"].get(split, {})
    if metric not in scores:
        where = f"the {split} rows of {row.get('task')}"
        raise ConfigError(f"there is no metric {metric!r} of {where}; there are: {listing(scores)}")
    value = scores[metric]
    return value if value is not None and math.isfinite(value) else None


def fingerprint(source: str) -> str:
    """The fingerprint of a path's content; a name that is not a path stands for itself.

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
