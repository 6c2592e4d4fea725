from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorica.errors import FileError
from lorica.train.data.sources import read_file
from lorica.train.data.tables import Form, Found

A, B = {"text": "a", "label": 1}, {"text": "b", "label": 2}
QUESTION = {"question": "who?", "id": "q1", "answers": [{"text": "Ann", "answer_start": 0}]}
NO_ANSWER = {
    "question": "why?",
    "id": "q2",
    "is_impossible": True,
    "answers": [],
    "plausible_answers": [{"text": "x", "answer_start": 1}],
}
SQUAD = {
    "version": "2.0",
    "data": [{"title": "T", "paragraphs": [{"context": "Ann ran.", "qas": [QUESTION, NO_ANSWER]}]}],
}


def read(path: Path, content: Any) -> dict[str | None, Found]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_file(path, Form())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2}'),
        ("rows.ndjson", '{"text": "a", "label": 1}\r\n\r\n{"text": "b", "label": 2}\r\n'),
        ("rows.jsonl", '{"text": "a", "label": 1},\n{"text": "b", "label": 2},\n'),
        ("rows.json", '{"text": "a", "label": 1}\n{"text": "b", "label": 2}'),
        ("rows.json", json.dumps([A, B])),
        ("rows.jsonl", json.dumps([A, B], indent=2)),
        ("rows.json", json.dumps(A, indent=2) + "\n" + json.dumps(B, indent=2)),
        ("rows.json", json.dumps({"version": 1, "data": [A, B]})),
        ("rows.json", json.dumps({"data": [A, B]}, indent=1)),
        ("rows.json", json.dumps({"text": ["a", "b"], "label": [1, 2]})),
        ("rows.json", json.dumps({"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": 2}})),
    ],
)
def test_forms_of_json(name: str, content: str, tmp_path: Path) -> None:
    (found,) = read(tmp_path / name, content).values()
    assert found.rows.to_list() == [A, B]


def test_one_object_is_one_row(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    words = {"tokens": ["a", "b"], "id": 1}
    for name, row in (("a.json", A), ("b.json", chat), ("c.jsonl", chat), ("d.json", words)):
        assert read(tmp_path / name, row)[None].rows.to_list() == [row]


def test_splits_in_one_file(tmp_path: Path) -> None:
    found = read(tmp_path / "rows.json", {"train": [A], "test": [B]})
    assert {name: each.rows.to_list() for name, each in found.items()} == {"train": [A], "test": [B]}


def test_squads_own_file(tmp_path: Path) -> None:
    for content in (SQUAD, json.dumps(SQUAD, indent=1)):
        assert read(tmp_path / "dev-v2.0.json", content)[None].rows.to_list() == [
            {
                "id": "q1",
                "title": "T",
                "context": "Ann ran.",
                "question": "who?",
                "answers": {"text": ["Ann"], "answer_start": [0]},
            },
            {
                "id": "q2",
                "title": "T",
                "context": "Ann ran.",
                "question": "why?",
                "answers": {"text": [], "answer_start": []},
            },
        ]
    broken = json.loads(json.dumps(SQUAD))
    del broken["data"][0]["paragraphs"][0]["qas"][1]["question"]
    with pytest.raises(FileError, match=r"is no file of SQuAD's: after question 1, .* lacks 'question'"):
        read(tmp_path / "dev-v2.0.json", broken)


def test_texts_stay_as_they_are_written(tmp_path: Path) -> None:
    lines = [
        '{"text": "2001-01-01", "n": 1.5}',
        '{"text": "1.10", "n": 2}',
        '{"text": "null", "more": "x\\u2028y"}',
    ]
    (found,) = read(tmp_path / "rows.jsonl", "\n".join(lines)).values()
    assert found.rows.to_list() == [
        {"text": "2001-01-01", "n": 1.5, "more": None},
        {"text": "1.10", "n": 2.0, "more": None},
        {"text": "null", "n": None, "more": "x\u2028y"},
    ]


def test_texts_and_numbers_in_one_column_are_texts_as_written(tmp_path: Path) -> None:
    content = "\n".join(
        f'{{"label": {value}}}' for value in ('"x"', "01"[1:], "1.10", "1e5", "true", "null", "9" * 30)
    )
    (found,) = read(tmp_path / "rows.jsonl", content).values()
    assert found.rows["label"][:] == ["x", "1", "1.10", "1e5", "True", None, "9" * 30]
    assert found.notes == (
        "column 'label' holds texts and numbers, truth values, whole numbers, which are taken as texts, "
        "as they are "
        "written",
    )


def test_unlike_lists_stay_as_they_are(tmp_path: Path) -> None:
    rows = [{"m": [{"content": "a"}, {"content": [{"type": "text", "text": "b"}]}]}, {"m": "c"}, {"m": None}]
    (found,) = read(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))).values()
    assert found.rows.to_list() == rows


def test_broken_lines(tmp_path: Path) -> None:
    content = '{"text": "a"}\n{"text": \n\n[1]\n{"text": "b", "text": "c"}\n{"text": "d"}\n'
    (found,) = read(tmp_path / "rows.jsonl", content).values()
    assert found.rows["text"][:] == ["a", None, None, None, "d"]
    assert list(found.lines or []) == [1, 2, 4, 5, 6]
    assert {row: problem.split(":")[0] for row, problem in found.broken.items()} == {
        1: "is no JSON",
        2: "is a list, where an object ({...}) is due",
        3: "is no JSON",
    }
    assert "it has 'text' twice" in found.broken[3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": ', "cannot read .*rows.json as json"),
        ("text,label\na,b\n", "cannot read .*rows.json as json"),
        ("3", "holds a number, where a list of objects is due"),
        ('["a", "b"]', "holds a list of texts, where objects"),
        ("[]", "has no rows"),
        (" \n ", "has no rows"),
        ("[" * 100_000, "too deep"),
        ('{"text": "a\\ud800"}', "row 1 of .*rows.json holds half of a surrogate pair"),
    ],
)
def test_files_that_are_refused(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message):
        read(tmp_path / "rows.json", content)
