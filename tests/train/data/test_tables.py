from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from lorica.errors import ConfigError, FileError
from lorica.train import DataConfig
from lorica.train.data import splits as data
from lorica.train.data.tables import as_found, in_memory

ROWS = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]


class Polars:
    def to_dicts(self) -> list[dict[str, Any]]:
        return ROWS


@pytest.mark.parametrize(
    "rows",
    [
        Dataset.from_list(ROWS),
        DatasetDict({"train": Dataset.from_list(ROWS)}),
        ROWS,
        tuple(ROWS),
        {"text": ["a", "b"], "label": [1, 2]},
        {"train": ROWS},
        {"train": {"text": ["a", "b"], "label": [1, 2]}},
        pd.DataFrame(ROWS),
        pd.DataFrame(ROWS, index=[7, 3]),
        {"train": pd.DataFrame(ROWS)},
        pd.DataFrame({"text": pd.Categorical(["a", "b"]), "label": np.array([1, 2], np.int8)}),
        pd.DataFrame({"text": pd.array(["a", "b"], "string"), "label": pd.array([1, 2], "Int64")}),
        [{"text": np.str_("a"), "label": np.int64(1)}, {"text": "b", "label": 2}],
        pa.Table.from_pylist(ROWS),
        Polars(),
    ],
)
def test_rows_in_any_form(rows: Any) -> None:
    assert in_memory(rows)["train"].rows.to_list() == ROWS


def test_gaps_are_gaps() -> None:
    frame = pd.DataFrame({"text": ["a", None, float("nan"), pd.NA], "n": [1, None, 2, 3]})
    assert as_found(frame).rows.to_list() == [
        {"text": "a", "n": 1.0},
        {"text": None, "n": None},
        {"text": None, "n": 2.0},
        {"text": None, "n": 3.0},
    ]
    assert as_found([{"text": "a"}, {"label": 1}]).rows.to_list() == [
        {"text": "a", "label": None},
        {"text": None, "label": 1},
    ]


def test_lists_of_words() -> None:
    rows = [{"tokens": ["a", "b"], "tags": ["O", "O"]}]
    assert as_found(rows).rows.to_list() == rows
    assert (
        as_found(pd.DataFrame({"tokens": [np.array(["a", "b"])], "tags": [["O", "O"]]})).rows.to_list()
        == rows
    )


def test_texts_and_numbers_in_one_column_are_texts() -> None:
    found = as_found([{"label": "x"}, {"label": 1}, {"label": 2.0}, {"label": 2.5}])
    assert found.rows["label"][:] == ["x", "1", "2", "2.5"]
    assert "column 'label' holds texts and numbers, whole numbers" in found.notes[0]


def test_splits_are_taken_by_their_names() -> None:
    splits = data.load(DataConfig(), {"train": ROWS * 5, "dev": pd.DataFrame(ROWS), "test": ROWS[:1]})
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 10, "validation": 2, "test": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("film", "rows in Python must be a datasets.Dataset, .*, not str"),
        (["film"], "not a list of str"),
        ([], "not an empty list"),
        ({}, "not an empty mapping"),
        ({"train": ["film"], "test": "film"}, "not a list of str"),
        (
            {"text": ["a"], "label": [1, 2]},
            "columns of the rows given in Python have unlike lengths: text 1, label 2",
        ),
        (Dataset.from_list(ROWS).to_iterable_dataset(), "not an IterableDataset"),
        (pd.DataFrame({"text": []}), "not a table without rows"),
        (7, "not int"),
    ],
)
def test_what_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        in_memory(rows)


def test_two_columns_of_one_name() -> None:
    frame = pd.DataFrame([["a", "b"]], columns=["text", "text"])
    with pytest.raises(FileError, match="the DataFrame has two columns of the name 'text'"):
        as_found(frame)
