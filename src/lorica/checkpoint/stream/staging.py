"""An output folder that takes minutes to write; an interrupted writer continues after the last finished file.

OUT/.merging/manifest.json     the job, and its finished files
OUT/.merging/parts/NAME        the file being written
OUT/.merging/files/NAME        finished files, flushed to the disk before the manifest says so
OUT/NAME                       all files, moved here once all are finished; the file the folder loads by, last
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lorica.checkpoint.atomic import flush
from lorica.errors import FileError, listing
from lorica.reading import read_object

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out
    fcntl = None

FOLDER = ".merging"
_MANIFEST = "manifest.json"


class Staging:
    """The unfinished content of a folder."""

    def __init__(self, out: Path, job: Mapping[str, Any], done: dict[str, Any]) -> None:
        self.out, self.folder, self._job, self._done = out, out / FOLDER, dict(job), done
        # Apart from the manifest and the lock, whose names a checkpoint's own files may have.
        self._parts, self._files = self.folder / "parts", self.folder / "files"

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, job: Mapping[str, Any], *, resume: bool) -> Iterator[Self]:
        """Begin to fill a folder, or continue where another process stopped.

        Args:
            out: new, empty, or left unfinished by the same job.
            job: JSON that decides the content; only the same job may continue.
            resume: False discards the files of an unfinished job.

        Raises:
            FileError: the folder holds other files, another process is writing to it, or it cannot be
                written.
        """
        folder = out / FOLDER
        if out.exists() and not out.is_dir():
            raise FileError(f"{out} is a file; choose a new folder")
        if out.is_dir() and not folder.is_dir() and any(out.iterdir()):
            raise FileError(f"{out} is there already and not empty; choose a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(out, folder):
            before = _read_manifest(folder)
            done = before.get("done", {})
            # Before a first file is finished there is nothing to tell apart, and nothing to lose.
            if done and resume and before["job"] != job:
                raise FileError(_other_job(out, before["job"], job))
            stage = cls(out, job, done)
            if not resume or not done:
                stage._clear()
            stage._write_manifest()
            yield stage

    def record(self, name: str) -> Any:
        """The record of a finished file; None if it is not finished, or has changed since."""
        note = self._done.get(name)
        return note["record"] if note and self._is_intact(name) else None

    def part(self, name: str) -> Path:
        """The place of a file before it is finished."""
        path = self._parts / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, name: str, record: Any) -> None:
        """Take a file as finished, once the disk has it.

        Args:
            name: of the file, written to `part`.
            record: JSON that `record` returns.
        """
        part, path = self._parts / name, self._files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        flush(part)
        part.replace(path)
        flush(path.parent)
        self._done[name] = {"identity": _identity(path), "record": record}
        self._write_manifest()

    def publish(self, names: Sequence[str]) -> None:
        """Move the finished files to their places, in this order, and remove everything else.

        The file without which the folder does not load comes last.
        """
        for name in names:
            if (self._files / name).is_file():
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                (self._files / name).replace(self.out / name)
        flush(self.out)
        self.discard()

    def discard(self) -> None:
        """Remove what is unfinished."""
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.out.rmdir()  # only if nothing is in it

    def _clear(self) -> None:
        for name in self._done:
            (self.out / name).unlink(missing_ok=True)
        self._done.clear()
        self._write_manifest()
        for folder in (self._parts, self._files):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)

    def _is_intact(self, name: str) -> bool:
        for path in (self._files / name, self.out / name):
            with contextlib.suppress(FileNotFoundError):
                return _identity(path) == self._done[name]["identity"]
        return False

    def _write_manifest(self) -> None:
        path = self.folder / _MANIFEST
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"job": self._job, "done": self._done}), encoding="utf-8")
        flush(part)
        part.replace(path)


_LOCK = "lock"


@contextlib.contextmanager
def _alone(out: Path, folder: Path) -> Iterator[None]:
    """Keep every other process out; a killed one does so no longer."""
    with (folder / _LOCK).open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileError(
                    f"another process is writing to {out}; wait for it, or choose another folder"
                ) from None
        yield


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        content = read_object(path)
        job, done = content["job"], content["done"]
        # What is named here may be removed; it is in this folder, or nobody's business.
        if all(_is_inside(folder.parent, name) and _is_note(note) for name, note in done.items()):
            return {"job": dict(job), "done": done}
        problem: object = "it names what no merge writes"
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = error
    raise FileError(f"{path} is damaged: {problem}; remove {folder} and start again")


def _is_note(note: Mapping[str, Any]) -> bool:
    """Whether this is a record that `finish` writes: a file's identity, and its layers' losses."""
    record = note["record"]
    return isinstance(note["identity"], list) and (
        record is None
        or (isinstance(record, dict) and all(isinstance(v, int | float | None) for v in record.values()))
    )


def _is_inside(out: Path, name: str) -> bool:
    return (out / name).resolve().is_relative_to(out.resolve())


def _other_job(out: Path, before: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    differ = [key for key in {**before, **job} if before.get(key) != job.get(key)]
    return (
        f"{out} holds an unfinished merge of other inputs (not the same: {listing(differ)}); choose a new "
        "folder, or start again with resume=False (lorica merge: --restart)"
    )


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
