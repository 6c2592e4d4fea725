from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from lorica.errors import FileError
from lorica.train import DataConfig
from lorica.train.data import splits as data
from lorica.train.data.sources import read_file
from lorica.train.data.tables import Form

openpyxl = pytest.importorskip("openpyxl", reason="lorica[excel] is not installed")


def write(path: Path, **sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_cells_are_the_texts_that_they_show(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.xlsx",
        Rows=[
            ["text", "label"],
            ["a, b\nc", 1],
            [None, None],
            [" 1.10 ", 2.5],
            [True, datetime.date(2024, 1, 2)],
        ],
    )
    book = openpyxl.load_workbook(path)
    book.active["A6"], book.active["B6"] = 7, 3
    book.active["A6"].number_format, book.active["B6"].number_format = "000", "0.00"
    book.save(path)
    (found,) = read_file(path, Form()).values()
    assert found.rows.to_list() == [
        {"text": "a, b\nc", "label": "1"},
        {"text": " 1.10 ", "label": "2.5"},
        {"text": "TRUE", "label": "2024-01-02"},
        {"text": "007", "label": "3.00"},
    ]
    assert list(found.lines or []) == [2, 4, 5, 6]


def test_sheets_are_splits_or_are_named(tmp_path: Path) -> None:
    rows = [["text", "label"], ["a", "x"], ["b", "y"]]
    splits = data.load(DataConfig(train=str(write(tmp_path / "a.xlsx", train=rows, test=rows[:2], notes=[]))))
    assert {name: each.rows["text"][:] for name, each in splits.used().items() if name == "test"} == {
        "test": ["a"]
    }
    book = write(tmp_path / "b.xlsx", One=rows, Two=rows[:2])
    with pytest.raises(FileError, match=r"holds One, Two; name one of them: .*b\.xlsx#One"):
        data.read(str(book))
    assert data.read(f"{book}#Two")["Two"]["text"][:] == ["a"]
    assert data.load_test(f"{book}#Two").rows["text"][:] == ["a"]


def test_workbooks_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"no workbook")
    with pytest.raises(FileError, match=r"cannot read .*a\.xlsx as xlsx"):
        data.read(str(tmp_path / "a.xlsx"))
    with pytest.raises(FileError, match="has no rows"):
        data.read(str(write(tmp_path / "b.xlsx", Rows=[["text", "label"]])))
