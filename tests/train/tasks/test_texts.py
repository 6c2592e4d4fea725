from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from train import tiny
from transformers import PreTrainedModel

from lorica.errors import ConfigError, FileError, LoricaError
from lorica.train import DataConfig, Recipe, evaluate, predict, tasks, train
from lorica.train.data.splits import Splits

CLASSES, MULTI = "sequence-classification", "multi-label-classification"


def ends(task: str, model: Path, folder: Path, rows: list[dict[str, Any]], **training: Any) -> Recipe:
    """A short run on rows, scored on the same rows."""
    data = tiny.write_rows(folder / "rows.jsonl", rows)
    recipe = tiny.recipe(model, data, folder / "out", **{"epochs": 12, "load_best": False, **training})
    return recipe.replace(
        task=task,
        data={"validation_fraction": 0.0, "test": str(data)},
        method={"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
    )


def count(text: str) -> int:
    return sum(word in tiny.GOOD for word in text.split())


def test_regression_from_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "score": float(count(row["text"]))} for row in tiny.sentences(40)]
    result = train(ends("regression", tiny_model, tmp_path, rows, learning_rate=3e-3))
    assert result.metrics["test"]["pearson"] > 0.5
    assert evaluate(result.output)["mse"] == pytest.approx(result.metrics["test"]["mse"], abs=1e-5)
    said = predict(result.output, ["lovely great film", "awful grim plot"])
    assert [set(row) for row in said] == [{"text", "score"}] * 2
    assert json.loads((result.output / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_a_new_output_starts_at_the_mean_of_the_numbers(tiny_model: Path, tmp_path: Path) -> None:
    task, features = tasks.get("regression"), Dataset.from_dict({"labels": [1.0, 2.0, 6.0]})

    def begun(folder: Path) -> tuple[PreTrainedModel, float, float]:
        """A model, and its output's bias before and after it is begun."""
        model = task.model(str(folder), DataConfig())
        before = model.get_parameter("classifier.bias").item()
        task.begin(model, features)
        return model, before, model.get_parameter("classifier.bias").item()

    model, *biases = begun(tiny_model)
    assert biases == [0, 3]
    model.get_parameter("classifier.bias").data.fill_(5.0)
    model.save_pretrained(tmp_path / "trained")
    assert begun(tmp_path / "trained")[1:] == (5, 5), "what was learned stays"
    classes = tasks.get(CLASSES).model(str(tiny_model), DataConfig(labels=["a", "b", "c"]))
    classes.save_pretrained(tmp_path / "classes")
    assert begun(tmp_path / "classes")[2] == 3, "a head of another shape is a new one"


def test_several_labels_from_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "labels": [row["label"]] + ["song"] * ("song" in row["text"])}
        for row in tiny.sentences(40)
    ]
    recipe = ends("multi-label-classification", tiny_model, tmp_path, rows, epochs=15, learning_rate=3e-3)
    result = train(recipe)
    assert result.metrics["test"]["f1_micro"] > 0.75
    (said,) = predict(result.output, ["lovely great song"])
    assert set(said["labels"]) == {"good", "song"}
    assert set(said["probabilities"]) == {"bad", "good", "song"}


def test_labels_as_columns_of_zeros_and_ones() -> None:
    task = tasks.get("multi-label-classification")
    rows = Dataset.from_dict({"text": ["a", "b"], "sad": [0, 1], "mad": [1, 1]})
    data = task.resolve(Splits(rows), DataConfig(labels=["mad", "sad"]))
    assert data.label is None
    assert task.encode(rows, data, tiny.tokenizer(), 8, "the rows").features["labels"] == [[1, 0], [1, 1]]


def test_labels_as_lists_of_names_or_ids() -> None:
    task = tasks.get("multi-label-classification")
    rows = Dataset.from_dict({"text": ["a", "b"], "labels": [["x", "y"], []]})
    data = task.resolve(Splits(rows), DataConfig())
    assert data.labels == ["x", "y"]
    assert task.encode(rows, data, tiny.tokenizer(), 8, "the rows").features["labels"] == [[1, 1], [0, 0]]
    ids = Dataset.from_dict({"text": ["a", "b"], "labels": [[1], [0, 1]]})
    data = task.resolve(Splits(ids), DataConfig(labels=["x", "y"]))
    assert task.encode(ids, data, tiny.tokenizer(), 8, "the rows").features["labels"] == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("task", "columns", "data", "message"),
    [
        ("regression", {"text": ["a", "b"], "score": ["x", "y"]}, {}, "row 1 .* has 'x' .*, where a number"),
        (
            "regression",
            {"text": ["a", "b"], "score": [1.0, None]},
            {},
            "row 2 .* has nothing in column 'score'",
        ),
        ("regression", {"text": ["a", "b"], "score": [1.0, float("nan")]}, {}, "row 2 .* has nan in column"),
        ("regression", {"text": ["a", "b"], "score": [1.0, 1.0]}, {}, "the same number in column 'score'"),
        ("regression", {"text": ["a", "b"], "score": [1.0, 2.0]}, {"labels": ["x"]}, "no classes"),
        ("regression", {"text": ["a", "b"], "mark": [1.0, 2.0]}, {}, "which column holds the label"),
        (MULTI, {"text": ["a"], "labels": ["x"]}, {}, "row 1 .* where a list is due"),
        (MULTI, {"text": ["a"], "labels": [[None]]}, {}, "row 1 .* has no label"),
        (MULTI, {"text": ["a"], "labels": [["z"]]}, {"labels": ["x", "y"]}, "has the label 'z'"),
        (MULTI, {"text": ["a"], "x": [2], "y": [0]}, {"labels": ["x", "y"]}, "has 2 in column 'x'"),
        (MULTI, {"text": ["a"], "x": [0], "y": [0]}, {"labels": ["x", "y"]}, "no training row"),
        (CLASSES, {"text": ["a", "b"], "label": [0.5, 1.5]}, {}, "--task regression"),
        (CLASSES, {"text": ["a", "b"], "label": [["x"], ["y"]]}, {}, f"--task {MULTI}"),
    ],
)
def test_rows_that_do_not_fit(task: str, columns: Any, data: Any, message: str) -> None:
    found = tasks.get(task)
    rows = Dataset.from_dict(columns)
    with pytest.raises(LoricaError, match=message):
        found.encode(
            rows, found.resolve(Splits(rows), DataConfig(**data)), tiny.tokenizer(), 8, "the training rows"
        )


def test_a_tokenizer_that_cannot_pad(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-text token"):
        tasks.get("regression").tokenizer(str(tmp_path))


def test_probabilities_do_not_overflow() -> None:
    (said,) = tasks.get("multi-label-classification").read(
        np.array([[-1000.0, 1000.0]]), Dataset.from_dict({}), DataConfig(labels=["x", "y"])
    )
    assert said == {"labels": ["y"], "probabilities": {"x": 0.0, "y": 1.0}}


OWN = """
from lorica.train.tasks import SequenceClassification

class Shouting(SequenceClassification):
    name = "shouting"

    def read(self, outputs, features, data):
        return [{"label": said["label"].upper()} for said in super().read(outputs, features, data)]
"""


def test_a_task_in_a_file_of_the_users_own(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    recipe = tiny.recipe(tiny_model, tiny_data, tmp_path / "out", max_steps=1)
    result = train(recipe.replace(task=f"{tmp_path / 'own.py'}:Shouting"))
    assert predict(result.output, ["film"], trust_task=True)[0]["label"] in ("GOOD", "BAD")
    with pytest.raises(ConfigError, match="trust_task"):
        predict(result.output, ["film"])
    assert tasks.get(str(tmp_path / "own.py")).name == "shouting"


def test_a_task_by_its_import_path() -> None:
    found = tasks.get("lorica.train.tasks.regression:Regression")
    assert isinstance(found, tasks.Regression)


@pytest.mark.parametrize(
    ("source", "entry", "error", "message"),
    [
        (OWN, "none.py:Shouting", FileError, "there is no file"),
        (OWN, "own.py:Shoutin", ConfigError, "has no 'Shoutin'; did you mean 'Shouting'"),
        ("Loud = 3", "own.py:Loud", ConfigError, "Loud is no lorica.train.Task"),
        ("", "own.py", ConfigError, "holds no class derived from lorica.train.Task"),
        (
            "import nowhere_at_all",
            "own.py:X",
            FileError,
            "No module named 'nowhere_at_all'",
        ),
        ("def", "own.py:X", FileError, "cannot import the task from .*SyntaxError"),
        (
            "from lorica.train import Task\nclass X(Task):\n    name = 'x'",
            "own.py:X",
            ConfigError,
            "leaves out collator, encode, .*task_type, auto_class, best_metric",
        ),
    ],
)
def test_files_that_hold_no_task(
    tmp_path: Path, source: str, entry: str, error: type[LoricaError], message: str
) -> None:
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(error, match=message):
        tasks.get(str(tmp_path / entry))


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(FileError, match="cannot import the task from nowhere"):
        tasks.get("nowhere.tasks:Mine")
