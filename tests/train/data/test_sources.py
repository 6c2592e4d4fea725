from __future__ import annotations

from pathlib import Path

import pytest

from lorica.errors import FileError
from lorica.train.data import splits as data


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_each_file_is_a_text(tmp_path: Path) -> None:
    write(tmp_path, b="two\nlines\n", a="one")
    assert data.read(str(tmp_path))["train"].to_list() == [{"text": "one"}, {"text": "two\nlines\n"}]


def test_files_in_folders_of_their_classes(tmp_path: Path) -> None:
    write(tmp_path, train__pos__1="good", train__neg__1="bad", test__pos__1="fine")
    found = data.read(str(tmp_path))
    assert set(found) == {"train", "test"}
    assert found["train"].features["label"].names == ["neg", "pos"]
    assert found["train"].to_list() == [{"text": "bad", "label": 0}, {"text": "good", "label": 1}]
    assert found["test"].features["label"].names == ["pos"]


def test_files_named_as_splits_hold_a_text_a_line(tmp_path: Path) -> None:
    write(tmp_path, train="one\ntwo\n", valid="three\n")
    found = data.read(str(tmp_path))
    assert {split: rows["text"][:] for split, rows in found.items()} == {
        "train": ["one", "two"],
        "valid": ["three"],
    }


def test_notes_beside_rows_are_no_rows(tmp_path: Path) -> None:
    write(tmp_path, LICENSE="free")
    (tmp_path / "reviews.csv").write_text("text,label\na,x\n")
    assert data.read(str(tmp_path))["train"].to_list() == [{"text": "a", "label": "x"}]
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "train.csv").write_text("text\na\n")
    with pytest.raises(FileError, match=r"has train\.csv and train\.jsonl; name the one to read"):
        data.read(str(tmp_path))


def test_files_beside_folders_of_them(tmp_path: Path) -> None:
    write(tmp_path, a="one", pos__1="two")
    with pytest.raises(FileError, match=r"has text files \(a\.txt\) beside folders of them \(pos\)"):
        data.read(str(tmp_path))
