"""Labels as people write them: which of them are one class, which are refused, and what is told."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from lorica.errors import ConfigError, LoricaError
from lorica.train import DataConfig, RowError, tasks
from lorica.train.data import columns
from lorica.train.data.labels import notes_on_labels
from lorica.train.data.rows import parsed_cell
from lorica.train.data.splits import Splits


def rows(values: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": ["film"] * len(values), "label": values})


@pytest.mark.parametrize(
    ("values", "names", "ids"),
    [
        (["01", "1", "01"], ["01", "1"], [0, 1, 0]),
        (["1.10", "1.1", "1.10"], ["1.1", "1.10"], [1, 0, 1]),
        (["10", "9", "10"], ["9", "10"], [1, 0, 1]),
        ([" pos", "neg", "pos "], ["neg", "pos"], [1, 0, 1]),
        (["True", "false", "TRUE", "true"], ["True", "false"], [0, 1, 0, 0]),
        (["True", "False", "TRUE", "false"], ["False", "True"], [1, 0, 1, 0]),
        (["yes", "no"], ["no", "yes"], [1, 0]),
        (["NA", "null", "None"], ["NA", "None", "null"], [0, 2, 1]),
        (["ดี", "x" * 200], ["x" * 200, "ดี"], [1, 0]),
    ],
)
def test_classes(values: list[str], names: list[str], ids: list[int]) -> None:
    assert columns.label_names(rows(values), "label") == names
    assert columns.label_ids(rows(values), "label", names, "the rows") == ids


def test_labels_that_differ_in_case_are_refused_or_named() -> None:
    values = ["Positive", "negative", "positive", "positive"]
    with pytest.raises(
        ConfigError,
        match=r"labels 'Positive' \(1 rows\) and 'positive' \(2 rows\) in column 'label' differ in case.*"
        r"--data.labels '\[negative, positive\]'",
    ):
        columns.label_names(rows(values), "label")
    with pytest.raises(ConfigError, match="differ in case alone"):
        columns.label_list_names(Dataset.from_dict({"label": [["A", "b"], ["a"]]}), "label")
    assert columns.label_ids(rows(values), "label", ["negative", "positive"], "the rows") == [1, 0, 1, 1]
    apart = ["Positive", "negative", "positive"]
    assert columns.label_ids(rows(values), "label", apart, "the rows") == [0, 1, 2, 2]
    with pytest.raises(RowError, match="has the label 'POSITIVE'"):
        columns.label_ids(rows(["POSITIVE"]), "label", apart, "the rows")


def test_what_is_taken_for_a_class_is_told() -> None:
    values = [" pos", "Pos", "neg", " pos", "other", 1, None]
    assert notes_on_labels(values, ["neg", "pos"], "label") == [
        "labels in column 'label': ' pos' is read as 'pos' (2 times), 'Pos' is read as 'pos' (1 times)"
    ]
    assert notes_on_labels([], ["01", "1", "a"], "label") == [
        "classes that are written otherwise and are the same number stay apart: '01' and '1'"
    ]
    task = tasks.get("sequence-classification")
    table = rows([" pos", "neg"])
    assert task.notes(table, task.resolve(Splits(table), DataConfig())) == [
        "labels in column 'label': ' pos' is read as 'pos' (1 times)"
    ]


@pytest.mark.parametrize(
    ("names", "value", "place"),
    [(["neg", "pos"], "1", 1), (["neg", "pos"], 0, 0), (["0", "1"], 1, 1), (["0", "1"], "1", 1)],
)
def test_numbers_in_texts_are_places_as_numbers_are(names: list[str], value: Any, place: int) -> None:
    assert columns.label_ids(rows([value]), "label", names, "the rows") == [place]


@pytest.mark.parametrize(
    ("names", "value"), [(["neg", "pos"], "01"), (["neg", "pos"], "2"), (["1", "2"], "0")]
)
def test_numbers_that_are_no_places(names: list[str], value: str) -> None:
    with pytest.raises(RowError, match=f"has the label '{value}'"):
        columns.label_ids(rows([value]), "label", names, "the rows")


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', \"b's\"]", ["a", "b's"]),
        ("[1, 2]", [1, 2]),
        ('{"text": ["a"], "answer_start": [0]}', {"text": ["a"], "answer_start": [0]}),
        ("{'text': ['a']}", {"text": ["a"]}),
        ("[]", []),
        # numpy's arrays have no commas; Python would join their texts.
        ("['a' 'b']", "['a' 'b']"),
        ("{'a': array(['b'], dtype=object)}", "{'a': array(['b'], dtype=object)}"),
        ("[a, b]", "[a, b]"),
        ("a; b", "a; b"),
        ("[__import__('os')]", "[__import__('os')]"),
        (["a"], ["a"]),
        (None, None),
    ],
)
def test_lists_in_cells(cell: Any, value: Any) -> None:
    assert parsed_cell(cell) == value


def test_lists_of_labels_in_cells() -> None:
    task = tasks.get("multi-label-classification")
    table = rows(["['b', 'a']", '["b"]', "[]"])
    config = task.resolve(Splits(table), DataConfig())
    assert config.labels == ["a", "b"]
    assert task.targets(table, config, "the rows") == [[1, 1], [0, 1], [0, 0]]  # type: ignore[attr-defined]
    with pytest.raises(
        LoricaError, match=r"has \"\['a' 'b'\]\" in column 'label', where a list is due, such as \["
    ):
        task.resolve(Splits(rows(["['a' 'b']", "['c']"])), DataConfig())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "3,5",
            "has '3,5' in column 'label', where a number is due; it is written with a point, such as 2.5",
        ),
        ("1_000", "has '1_000' in column 'label', where a number is due$"),
        ("nan", "has 'nan'"),
        ("", "has nothing"),
    ],
)
def test_texts_that_are_no_numbers(value: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        columns.numbers(rows([value]), "label", "the rows")
    assert columns.numbers(rows([" 2.5", "1e-3", "-7"]), "label", "the rows") == [2.5, 1e-3, -7.0]


def test_empty_texts_are_refused() -> None:
    table = Dataset.from_dict(
        {"text": ["film", "  ", "song"], "text_pair": ["a", "", "b"], "label": ["a", "b", "a"]}
    )
    columns.check_texts(table, ["text"], "the rows")
    with pytest.raises(RowError, match="row 2 of the rows has an empty text in column 'text'"):
        columns.check_texts(table, ["text"], "the rows", filled=True)
    with pytest.raises(RowError, match="row 2 of the rows has an empty text"):
        columns.check_texts(table, ["text", "text_pair"], "the rows", filled=True)
    # One text of a pair may be empty, as in public sets.
    half = Dataset.from_dict({"text": ["film"], "text_pair": [""]})
    columns.check_texts(half, ["text", "text_pair"], "the rows", filled=True)


def test_columns_of_numbers_are_no_texts() -> None:
    table = Dataset.from_dict({"id": ["1", "2"], "remark": ["a film", "3"], "label": ["x", "y"]})
    assert columns.find_texts(table, None, None) == ("remark", None)
    both = Dataset.from_dict({"Text": ["a"], "text": ["b"], "label": ["c"]})
    assert columns.find_texts(both, None, None) == ("text", None)
