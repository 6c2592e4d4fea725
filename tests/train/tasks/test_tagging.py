"""Scores of tagged spans: equal to seqeval's own and to spans counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from train import tiny
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError, MissingExtra
from lorica.train import DataConfig, Record, evaluate, predict, tasks, train
from lorica.train.data.splits import Splits
from lorica.train.metrics import tagging
from lorica.train.metrics.predictions import marks_spans, spans

TASK = "token-classification"
# The example of seqeval's own description.
TRUE = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
SAID = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def test_the_example_of_seqeval() -> None:
    assert tagging(SAID, TRUE) == pytest.approx({"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 0.8})


def test_spans_count_whole() -> None:
    said = [["B-PER", "I-PER", "O"], ["B-LOC", "O"], ["B-PER", "O", "B-LOC"], ["B-LOC"]]
    true = [["B-PER", "I-PER", "O"], ["B-PER", "O"], ["B-PER", "I-PER", "B-LOC"], ["O"]]
    right, told, there = 2, 5, 4
    expected = {"f1": 2 * right / (told + there), "precision": right / told, "recall": right / there}
    assert tagging(said, true) == pytest.approx({**expected, "accuracy": 6 / 9})
    assert tagging([["O"]], [["O"]])["f1"] == 0


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@given(st.lists(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1), min_size=1))
def test_scores_are_those_of_seqeval(rows: list[list[tuple[str, str]]]) -> None:
    from seqeval import metrics

    said, true = ([[pair[i] for pair in row] for row in rows] for i in (0, 1))
    theirs = {
        name: getattr(metrics, f"{name}_score")(true, said, zero_division=0)
        for name in ("f1", "precision", "recall")
    }
    assert tagging(said, true) == pytest.approx({**theirs, "accuracy": metrics.accuracy_score(true, said)})


@pytest.mark.parametrize(
    ("names", "marked"),
    [
        (("O", "B-PER", "I-PER"), True),
        (("O", "B-PARAMETER"), True),
        (("O", "S-X", "E-X", "I-X", "B-X"), True),
        (("I-LOC", "I-PER"), True),
        (("O", "PER"), False),
        (("NOUN", "VERB"), False),
        (("O", "B-"), False),
        (("O",), False),
    ],
)
def test_which_classes_mark_spans(names: tuple[str, ...], marked: bool) -> None:
    assert marks_spans(names) == marked


def test_spans_of_a_text() -> None:
    assert spans(["B-PER", "I-PER", "O", "B-LOC", "B-LOC"]) == [
        {"label": "PER", "start": 0, "end": 2},
        {"label": "LOC", "start": 3, "end": 4},
        {"label": "LOC", "start": 4, "end": 5},
    ]


def encoded(labels: list[list[str]], limit: int = 16) -> Any:
    rows = Dataset.from_dict({"tokens": [["film"] * len(row) for row in labels], "tags": labels})
    task = tasks.get(TASK)
    data = task.resolve(Splits(rows), DataConfig())
    return task.encode(rows, data, tiny.tokenizer(), limit, "the training rows"), data


def outputs(features: Any, said: list[list[str]], names: list[str]) -> np.ndarray:
    """Logits by which the first token of each word has a class."""
    longest = max(features["length"])
    logits = np.zeros((len(said), longest, len(names)))
    for row, (firsts, tags) in enumerate(zip(features["first_tokens"], said, strict=True)):
        for word, token in firsts:
            logits[row, token, names.index(tags[word])] = 1
    return logits


def test_the_task_scores_spans_by_the_names_of_its_classes() -> None:
    found, data = encoded(TRUE)
    names = data.labels
    assert names == ["B-MISC", "B-PER", "I-MISC", "I-PER", "O"]
    outcome = EvalPrediction(outputs(found.features, SAID, names), label_ids=np.array([]))
    task = tasks.get(TASK)
    assert task.metrics(outcome, found.features) == pytest.approx(tagging(SAID, TRUE))
    assert not task.remarks(data)
    said = task.read(outputs(found.features, SAID, names), found.features, data)
    assert said[1]["spans"] == [{"label": "PER", "start": 0, "end": 2}]


def test_words_past_the_length_are_not_scored() -> None:
    found, data = encoded(TRUE, limit=5)  # three words and two tokens of the model's own
    cut = [[*row[:3], *("O" for _ in row[3:])] for row in SAID]
    outcome = EvalPrediction(outputs(found.features, cut, data.labels), label_ids=np.array([]))
    expected = tagging([row[:3] for row in SAID], [row[:3] for row in TRUE])
    read = sum(min(len(row), 3) for row in TRUE) / sum(map(len, TRUE))
    scores = tasks.get(TASK).metrics(outcome, found.features)
    assert scores == pytest.approx({**expected, "words_read": read})
    (row, _) = tasks.get(TASK).read(outputs(found.features, cut, data.labels), found.features, data)
    assert row["labels"][3:] == [None] * 4
    assert row["spans"] == [{"label": "MISC", "start": 2, "end": 3}]


def test_spans_from_end_to_end(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = []
    for each in tiny.sentences(40):
        words = each["text"].split()
        tags = [f"B-{each['label'].upper()}" if word in tiny.GOOD + tiny.BAD else "O" for word in words]
        rows.append({"tokens": words, "ner_tags": tags})
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    recipe = tiny.recipe(tiny_model, data, tmp_path / "out", epochs=15, learning_rate=3e-3)
    result = train(recipe.replace(task=TASK))
    scores = result.metrics["validation"]
    assert list(scores)[1:5] == ["f1", "precision", "recall", "accuracy"]
    assert scores["f1"] > 0.9
    assert "mark spans" not in capsys.readouterr().out
    assert f"{scores['f1']:.2%}" in (result.output / "README.md").read_text()
    assert Record.load(result.output).results["metrics"]["validation"]["f1"] == scores["f1"]
    answers = predict(result.output, data)
    again = tagging([row["labels"] for row in answers], [row["ner_tags"] for row in rows])  # type: ignore[misc]
    found = evaluate(result.output, str(data))
    assert {name: found[name] for name in again} == pytest.approx(again)
    assert all(row["spans"] == spans(row["labels"]) for row in answers)


def test_a_single_class_is_no_classification() -> None:
    rows = Dataset.from_list([{"tokens": ["a", "b"], "tags": ["O", "O"]}])
    with pytest.raises(ConfigError, match="all words in column 'tags' of the training rows are 'O'"):
        tasks.get("token-classification").resolve(Splits(rows), DataConfig())


def test_plain_classes_are_scored_by_words_and_a_line_says_so(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"tokens": ["great", "film"], "tags": ["X", "Y"]} for _ in range(8)]
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    recipe = tiny.recipe(tiny_model, data, tmp_path / "out", max_steps=1)
    result = train(recipe.replace(task=TASK))
    assert "do not mark spans" in capsys.readouterr().out
    assert "f1_macro" in result.metrics["validation"]
    assert "spans" not in predict(result.output, ["film"])[0]


def test_without_seqeval_it_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqeval.metrics.sequence_labeling", None)
    with pytest.raises(MissingExtra, match=r"seqeval.*lorica\[train\]"):
        encoded(TRUE)
