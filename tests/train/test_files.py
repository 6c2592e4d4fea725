from __future__ import annotations

from pathlib import Path

import pytest

from lorica.errors import FileError
from lorica.train import system as files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    files.write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.json", "old")]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot write to .*file/run: .*; choose another folder"):
        files.writable_directory(tmp_path / "file" / "run")
    assert files.writable_directory(tmp_path / "a" / "b").is_dir()


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("xyz")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("xy")
    assert files.bytes_of(tmp_path / "a") == 3
    assert files.bytes_of(tmp_path) == 5
