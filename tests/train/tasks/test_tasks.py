from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import transformer
from train import tiny
from transformers import BertConfig, GPT2Config, RobertaConfig, T5Config, XLNetConfig
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError, FileError
from lorica.train import DataConfig, Task, register, tasks
from lorica.train.data.splits import Splits
from lorica.train.tasks import SequenceClassification
from lorica.train.tasks.base import positions_of

TASK = SequenceClassification()
NONE = Dataset.from_dict({})


def splits(**columns: list[Any]) -> Splits:
    return Splits(Dataset.from_dict(columns))


def test_a_user_adds_a_task_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))

    @register
    class Spam(SequenceClassification):
        name = "spam"

    assert isinstance(tasks.get("spam"), Spam)
    assert "spam" in tasks.names()
    with pytest.raises(ConfigError, match="there is a task 'spam' already"):
        register(type("Other", (Spam,), {}))


def test_an_unknown_task() -> None:
    with pytest.raises(
        ConfigError, match="no task 'sequence-clasification'; did you mean 'sequence-classification'"
    ):
        tasks.get("sequence-clasification")


def test_resolve_fills_in_what_was_left_out() -> None:
    found = TASK.resolve(
        splits(sentence1=["a", "b"], sentence2=["c", "d"], label=["no", "yes"]), DataConfig()
    )
    assert (found.text, found.text_pair, found.label, found.labels) == (
        "sentence1",
        "sentence2",
        "label",
        ["no", "yes"],
    )
    named = TASK.resolve(splits(text=["a", "b"], label=[0, 1]), DataConfig(labels=["neg", "pos"]))
    assert named.labels == ["neg", "pos"]


@pytest.mark.parametrize(
    ("columns", "data", "message"),
    [
        ({"text": ["a", "b"], "label": ["x", "x"]}, DataConfig(), "at least two classes"),
        (
            {"text": ["a", "b"], "label": ["x", "x"]},
            DataConfig(labels=["x", "y"]),
            "all training rows have the same label",
        ),
        (
            {"text": ["a", "b"], "label": ["x", "y"]},
            DataConfig(labels=["x", "x"]),
            "must name at least two classes, each once",
        ),
        (
            {"text": ["a", "b"], "label": ["x", "y"]},
            DataConfig(label="text"),
            "cannot be both text and label",
        ),
    ],
)
def test_resolve_refuses(columns: dict[str, list[Any]], data: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TASK.resolve(splits(**columns), data)


def test_encode_counts_what_it_cuts() -> None:
    data = DataConfig(text="text", label="label", labels=["bad", "good"])
    rows = Dataset.from_dict({"text": ["great film", "a very long and dull film"], "label": ["good", "bad"]})
    encoded = TASK.encode(rows, data, tiny.tokenizer(), 5, "the rows")
    assert (encoded.truncated, encoded.longest, len(encoded)) == (1, 8, 2)
    assert encoded.features["length"] == [4, 5]
    assert encoded.features["labels"] == [1, 0]
    assert (
        "labels"
        not in TASK.encode(rows, data, tiny.tokenizer(), 5, "the rows", labelled=False).features.column_names
    )


def test_encode_pairs() -> None:
    data = DataConfig(text="a", text_pair="b", label="label", labels=["x", "y"])
    rows = Dataset.from_dict({"a": ["great film"], "b": ["dull song"], "label": ["x"]})
    assert TASK.encode(rows, data, tiny.tokenizer(), 16, "the rows").features["length"] == [7]


def test_encode_names_a_missing_label_column() -> None:
    data = DataConfig(text="text", label="label", labels=["x", "y"])
    with pytest.raises(ConfigError, match="no column 'label' in the test rows; the columns are: text"):
        TASK.encode(Dataset.from_dict({"text": ["a"]}), data, tiny.tokenizer(), 5, "the test rows")


def test_read_gives_names_and_probabilities() -> None:
    (said,) = TASK.read(np.array([[0.0, np.log(3.0)]]), NONE, DataConfig(labels=["bad", "good"]))
    assert said["label"] == "good"
    assert said["probability"] == pytest.approx(0.75)
    assert said["probabilities"] == pytest.approx({"bad": 0.25, "good": 0.75})


def test_metrics_take_the_logits_of_models_that_return_more() -> None:
    logits = np.array([[0.0, 1.0], [1.0, 0.0]])
    outputs: Any = (logits, np.zeros((2, 3)))
    outcome = EvalPrediction(predictions=outputs, label_ids=np.array([1, 1]))
    assert TASK.metrics(outcome, NONE)["accuracy"] == 0.5


def test_rows_of_texts() -> None:
    assert TASK.rows(["a", "b"], DataConfig(text="body"))["body"] == ["a", "b"]
    pair = DataConfig(text="a", text_pair="b")
    assert TASK.rows(["x\ty"], pair).to_list() == [{"a": "x", "b": "y"}]
    with pytest.raises(ConfigError, match="this model reads pairs"):
        TASK.rows(["x"], pair)


@pytest.mark.parametrize(
    "load", [lambda name: TASK.tokenizer(name), lambda name: TASK.model(name, DataConfig(labels=["x", "y"]))]
)
def test_a_model_that_is_not_there(load: Any) -> None:
    with pytest.raises(FileError, match="'nobody/nothing'"):
        load("nobody/nothing")


def test_the_head_fits_the_classes(tiny_model: Path) -> None:
    model = TASK.model(str(tiny_model), DataConfig(labels=["a", "b", "c"]))
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.num_labels == 3
    assert model.name_or_path == str(tiny_model)


def test_a_classifier_reads_the_last_token_before_the_padding(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    model = transformer("llama-classifier")  # whose configuration says that 0 pads
    found = TASK.tokenizer(str(tmp_path))
    TASK.pad(model, found)
    rows = [{"input_ids": [2, 5, 6, 7, 8]}, {"input_ids": [2, 6]}]
    collate = TASK.collator(found)
    with torch.no_grad():
        together = model(**collate(rows)).logits
        alone = torch.cat([model(**collate([row])).logits for row in rows])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (BertConfig(max_position_embeddings=64), 64),
        (RobertaConfig(max_position_embeddings=66, pad_token_id=1), 64),
        (GPT2Config(n_positions=64), 64),
        (XLNetConfig(), None),
        (T5Config(), None),
    ],
)
def test_no_row_is_longer_than_the_model_takes(config: Any, most: int | None, tmp_path: Path) -> None:
    assert positions_of(config) == most
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    found = TASK.tokenizer(str(tmp_path))
    rows = Dataset.from_dict({"text": ["film " * 80, "song"], "label": [0, 1]})
    data = DataConfig(text="text", label="label", labels=["bad", "good"])
    assert TASK.encode(rows, data, found, 512, "the rows").features["length"][0] == (most or 82)


def test_a_task_must_say_everything() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Task()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("name", "labels", "padded"),
    [
        ("sequence-classification", [0, 1], [0, 1]),
        ("token-classification", [[0, 1, 0], [1, 0]], [[0, 1, 0], [1, 0, -100]]),
        ("question-answering", [0, 1], [0, 1]),
        ("causal-lm", [[2, 5, 3], [2, 3]], [[2, 5, 3], [2, 3, -100]]),
        ("seq2seq-lm", [[2, 5, 3], [2, 3]], [[2, 5, 3], [2, 3, -100]]),
    ],
)
def test_batches_are_padded_on_the_right_whatever_the_tokenizers_side(
    name: str, labels: list[Any], padded: list[Any]
) -> None:
    left = tiny.tokenizer()
    left.padding_side = "left"
    rows = [{"input_ids": [2, 5, 3], "labels": labels[0]}, {"input_ids": [2, 3], "labels": labels[1]}]
    batch = tasks.get(name).collator(left)(rows)
    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == padded
    assert left.padding_side == "left"
