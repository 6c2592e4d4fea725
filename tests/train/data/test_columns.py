from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lorica.errors import ConfigError, LoricaError
from lorica.train import RowError
from lorica.train.data import columns


def rows(**values: list[Any]) -> Dataset:
    return Dataset.from_dict(values)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["text", "label"], ("text", None)),
        (["idx", "Sentence", "label"], ("Sentence", None)),
        (["sentence1", "sentence2", "label"], ("sentence1", "sentence2")),
        (["premise", "hypothesis", "text", "label"], ("premise", "hypothesis")),
        (["question", "sentence", "label"], ("question", "sentence")),
        (["utterances", "label"], ("utterances", None)),
    ],
)
def test_texts_are_found_by_usual_names(names: list[str], expected: tuple[str, str | None]) -> None:
    values: dict[str, list[Any]] = {name: [0] if name in ("idx", "label") else ["x"] for name in names}
    assert columns.find_texts(rows(**values), None, None) == expected


def test_named_texts_win() -> None:
    table = rows(text=["x"], summary=["y"], label=[0])
    assert columns.find_texts(table, "summary", None) == ("summary", None)
    assert columns.find_texts(table, "summary", "text") == ("summary", "text")


def test_texts_that_cannot_be_found() -> None:
    table = rows(a=["x"], b=["y"], label=[0])
    with pytest.raises(ConfigError, match=r"name it with --data.text. The columns are: a, b, label"):
        columns.find_texts(table, None, None)
    with pytest.raises(
        ConfigError, match="there is no column 'lable' in the training rows; did you mean 'label'"
    ):
        columns.find_texts(table, "lable", None)
    with pytest.raises(ConfigError, match="name the first text too"):
        columns.find_texts(table, None, "a")


def test_labels_are_found_by_usual_names() -> None:
    assert columns.find_label(rows(text=["x"], Category=["y"]), None) == "Category"
    assert columns.find_label(rows(text=["x"], mine=["y"]), "mine") == "mine"
    with pytest.raises(ConfigError, match=r"name it with --data.label"):
        columns.find_label(rows(text=["x"], mine=["y"]), None)


@pytest.mark.parametrize(
    ("values", "names", "ids"),
    [
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        ([10, 9, 10], ["9", "10"], [1, 0, 1]),
        ([1, 0, 1], ["0", "1"], [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        ([1.0, 0.0, 1.0], ["0", "1"], [1, 0, 1]),
    ],
)
def test_names_and_ids_of_labels(values: list[Any], names: list[str], ids: list[int]) -> None:
    table = rows(label=values)
    assert columns.label_names(table, "label") == names
    assert columns.label_ids(table, "label", names, "the rows") == ids


def test_a_data_sets_own_names_are_kept() -> None:
    table = Dataset.from_dict({"label": [1, 0]}, Features({"label": ClassLabel(names=["neg", "pos"])}))
    assert columns.label_names(table, "label") == ["neg", "pos"]
    assert columns.label_ids(table, "label", ["pos", "neg"], "the rows") == [0, 1]


def test_a_data_sets_own_classes_may_be_given_other_names() -> None:
    of = Features({"label": ClassLabel(names=["neg", "pos"])})
    table = Dataset.from_dict({"label": [1, 0]}, of)
    assert columns.label_ids(table, "label", ["negative", "positive"], "the rows") == [1, 0]
    with pytest.raises(RowError, match="has the label -1"):
        columns.label_ids(Dataset.from_dict({"label": [-1]}, of), "label", ["bad", "good"], "the rows")
    # One of the names says that they are in an order of their own.
    with pytest.raises(RowError, match="row 2 of the rows has the label 'neg'"):
        columns.label_ids(table, "label", ["pos", "negative"], "the rows")


def test_whole_numbers_may_be_ids_of_given_names() -> None:
    assert columns.label_ids(rows(label=[0, 1]), "label", ["neg", "pos"], "the rows") == [0, 1]


@pytest.mark.parametrize(
    ("learned", "value"), [([1, 2, 5], 0), ([-1, 1], 0), ([0, 1, 2, 4], 3), (["1", "2", "other"], 0)]
)
def test_a_number_the_training_rows_lack_is_no_place_among_numbers(learned: list[Any], value: int) -> None:
    names = columns.label_names(rows(label=learned), "label")
    with pytest.raises(RowError, match=f"row 1 of the test rows has the label {value} in column 'label', wh"):
        columns.label_ids(rows(label=[value]), "label", names, "the test rows")
    lists = rows(label=[[value]])
    with pytest.raises(RowError, match=f"row 1 of the test rows has the label {value} in column 'label', wh"):
        columns.label_list_ids(lists, "label", names, "the test rows")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "a"], "all labels in column 'label' of the training rows are 'a'"),
        (["a", None], "row 2 of the training rows has no label"),
        (["a", ""], "row 2 of the training rows has no label"),
        ([0.5, 1.0], "row 1 of the training rows has the label 0.5"),
        ([[0], [1]], "has a list in column 'label' as its label"),
        ([str(i) for i in range(2000)], "2000 different values in 2000 rows"),
    ],
)
def test_labels_that_are_no_classes(values: list[Any], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        columns.label_names(rows(label=values), "label")


@pytest.mark.parametrize(
    ("value", "hint"),
    [("god", "did you mean 'good'"), ("zzz", "they have bad, good"), (7, "they have bad, good")],
)
def test_unseen_labels_are_named(value: Any, hint: str) -> None:
    with pytest.raises(RowError, match=f"row 1 of the test rows has the label {value!r}.*{hint}"):
        columns.label_ids(rows(label=[value]), "label", ["bad", "good"], "the test rows")


def test_unlabelled_rows_of_class_labels() -> None:
    table = Dataset.from_dict({"label": [-1, 0]}, Features({"label": ClassLabel(names=["neg", "pos"])}))
    with pytest.raises(RowError, match="row 1 of the test rows has the label -1"):
        columns.label_ids(table, "label", ["neg", "pos"], "the test rows")


def test_texts_must_be_texts() -> None:
    columns.check_texts(rows(text=["a", "b"]), ["text"], "the rows")
    with pytest.raises(ConfigError, match="no column 'text' in the rows; the columns are: body"):
        columns.check_texts(rows(body=["a"]), ["text"], "the rows")
    with pytest.raises(RowError, match="row 2 of the rows has nothing in column 'text'"):
        columns.check_texts(
            Dataset.from_dict({"text": ["a", None]}, Features({"text": Value("string")})),
            ["text"],
            "the rows",
        )
    with pytest.raises(RowError, match="row 1 of the rows has 3 in column 'text'"):
        columns.check_texts(rows(text=[3]), ["text"], "the rows")
