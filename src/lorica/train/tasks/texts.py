"""Tasks that read a text, or a pair, and answer with one output per row: a class, several, or a number."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError, listing
from lorica.train import metrics
from lorica.train.data.columns import (
    LABELS,
    check_texts,
    find_label,
    find_texts,
    label_ids,
    label_list_ids,
    label_list_names,
    label_names,
    numbers,
)
from lorica.train.data.labels import notes_on_labels
from lorica.train.data.rows import RowError, parsed_cell
from lorica.train.data.splits import Splits
from lorica.train.settings import DataConfig
from lorica.train.tasks.base import NEW_PARAMETERS, Encoded, Task, needs_tokens, padded_right


class TextTask(Task):
    """One output for each text or pair of texts. A subclass reads the labels."""

    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"

    @abstractmethod
    def targets(self, rows: Dataset, data: DataConfig, where: str) -> list[Any]:
        """The label of each row, as the model takes it."""

    def encode(
        self,
        rows: Dataset,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        where: str,
        *,
        labelled: bool = True,
    ) -> Encoded:
        """Tokenize the texts, without padding; count those that were too long."""
        columns = self.inputs(data)
        check_texts(rows, columns, where, filled=labelled)
        texts = list(rows[columns[0]])
        pairs = list(rows[columns[1]]) if len(columns) == 2 else None
        limit = min(max_length, tokenizer.model_max_length)
        # Tokenized once in full, to know what was cut: it is a small part of the time that one epoch takes.
        lengths = [len(ids) for ids in tokenizer(texts, pairs, truncation=False, verbose=False)["input_ids"]]
        features = dict(tokenizer(texts, pairs, truncation=True, max_length=limit))
        needs_tokens(features["input_ids"], where)
        features["length"] = [len(ids) for ids in features["input_ids"]]
        if labelled:
            features["labels"] = self.targets(rows, data, where)
        truncated = sum(length > limit for length in lengths)
        return Encoded(Dataset.from_dict(features), truncated, max(lengths), lengths=lengths)

    def encodes_apart(self, rows: Dataset, data: DataConfig) -> bool:
        """True of lorica's own."""
        return type(self).__module__ == __name__

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pad to the longest row of the batch."""
        return DataCollatorWithPadding(padded_right(tokenizer))

    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """A row for each text; a pair is given as two texts with a tab between."""
        return split_pairs(texts, self.inputs(data))


def split_pairs(texts: Sequence[str], columns: Sequence[str]) -> Dataset:
    """Rows of one or two columns; two texts have a tab between.

    Raises:
        ConfigError: a text is no pair where one is due.
    """
    if len(columns) == 1:
        return Dataset.from_dict({columns[0]: list(texts)})
    pairs = [text.split("\t") for text in texts]
    if bad := next((text for text, pair in zip(texts, pairs, strict=True) if len(pair) != 2), None):
        raise ConfigError(f"this model reads pairs: give two texts with a tab between them, not {bad!r}")
    return Dataset.from_dict({name: [pair[i] for pair in pairs] for i, name in enumerate(columns)})


def logits_of(outputs: Any) -> np.ndarray:
    """The logits (rows, ...): some models return hidden states beside them, after them."""
    return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    odds = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def named_outputs(names: Sequence[str], problem_type: str | None = None) -> dict[str, Any]:
    """Fields of a model's configuration for outputs with names."""
    fields: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return fields if problem_type is None else {**fields, "problem_type": problem_type}


class SequenceClassification(TextTask):
    """One class for each text or pair of texts: sentiment, topic, entailment."""

    name = "sequence-classification"
    best_metric = "accuracy"

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the text and label columns, and the classes' names."""
        text, text_pair = find_texts(splits.train, data.text, data.text_pair)
        label = find_label(splits.train, data.label)
        if label in (text, text_pair):
            raise ConfigError(
                f"column {label!r} cannot be both text and label; name both with --data.text and --data.label"
            )
        return replace(
            data,
            text=text,
            text_pair=text_pair,
            label=label,
            labels=classes(splits.train, label, data.labels),
        )

    def targets(self, rows: Dataset, data: DataConfig, where: str) -> list[int]:
        """Class ids."""
        assert data.label is not None
        return label_ids(rows, data.label, data.labels or [], where)

    def notes(self, rows: Dataset, data: DataConfig) -> list[str]:
        """Labels that are not written as the classes they are taken for."""
        return notes_on_labels(rows[str(data.label)], data.labels or [], str(data.label))

    def head(self, data: DataConfig) -> dict[str, Any]:
        """As many outputs as classes, with their names."""
        return named_outputs(data.labels or [], "single_label_classification")

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """Accuracy, F1, precision, recall and Matthews of the most likely classes; ROC-AUC of all."""
        logits = logits_of(outcome.predictions)
        return metrics.classification(logits.argmax(-1), outcome.label_ids, softmax(logits))

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """The most likely class, its probability, and those of all classes."""
        return most_likely(outputs, data.labels or [])


def classes(rows: Dataset, label: str, given: list[str] | None) -> list[str]:
    """Names of the classes: those given, or those found in the training rows.

    Raises:
        ConfigError: fewer than two, or one twice, or only one of them occurs.
    """
    labels = given or label_names(rows, label)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ConfigError(f"data.labels must name at least two classes, each once, not {labels}")
    if len(set(label_ids(rows, label, labels, "the training rows"))) < 2:
        raise ConfigError(
            f"all training rows have the same label in column {label!r}; classification needs at least "
            "two classes"
        )
    return labels


def most_likely(outputs: Any, names: list[str]) -> list[dict[str, Any]]:
    """The most likely class of each row, its probability, and those of all classes."""
    return [
        {
            "label": names[int(row.argmax())],
            "probability": float(row.max()),
            "probabilities": {name: float(p) for name, p in zip(names, row, strict=True)},
        }
        for row in softmax(logits_of(outputs))
    ]


class MultiLabelClassification(TextTask):
    """Any number of classes for each text or pair of texts: tags, emotions, topics.

    The labels are one column of lists of names or ids, or one column of 0 and 1 for each of ``data.labels``.
    """

    name = "multi-label-classification"
    best_metric = "f1_micro"

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the text and label columns, and the classes' names."""
        text, text_pair = find_texts(splits.train, data.text, data.text_pair)
        label, labels = data.label, data.labels
        if label is None and labels and set(labels) <= set(splits.train.column_names):
            if not any(map(any, self.targets(splits.train, data, "the training rows"))):
                raise ConfigError(f"no training row has any of the labels {listing(labels)}")
        else:
            label = find_label(splits.train, label)
            labels = labels or label_list_names(splits.train, label)
        if len(set(labels)) < len(labels):
            raise ConfigError(f"data.labels must name each class once, not {labels}")
        return replace(data, text=text, text_pair=text_pair, label=label, labels=labels)

    def targets(self, rows: Dataset, data: DataConfig, where: str) -> list[list[float]]:
        """1 for each class that a row has, else 0."""
        names = data.labels or []
        if data.label is None:
            columns = [numbers(rows, name, where) for name in names]
            for name, column in zip(names, columns, strict=True):
                bad = [row for row, value in enumerate(column) if value not in (0, 1)]
                if bad:
                    problem = f"has {column[bad[0]]:g} in column {name!r}, where 0 or 1 is due"
                    raise RowError(bad, where, problem)
            return [list(row) for row in zip(*columns, strict=True)]
        result = np.zeros((len(rows), len(names)))
        for row, ids in enumerate(label_list_ids(rows, data.label, names, where)):
            result[row, ids] = 1
        return result.tolist()

    def notes(self, rows: Dataset, data: DataConfig) -> list[str]:
        """Labels that are not written as the classes they are taken for."""
        if data.label is None:
            return []
        values = (item for items in rows[data.label] for item in parsed_cell(items) or [])
        return notes_on_labels(values, data.labels or [], data.label)

    def head(self, data: DataConfig) -> dict[str, Any]:
        """As many outputs as classes, each with a binary cross-entropy of its own."""
        return named_outputs(data.labels or [], "multi_label_classification")

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """F1, precision and recall of all decisions, rows that are wholly right, ROC-AUC."""
        return metrics.multi_label(_sigmoid(outcome.predictions), outcome.label_ids)

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """The classes with a probability of at least a half, and the probabilities of all."""
        names = data.labels or []
        return [
            {
                "labels": [name for name, p in zip(names, row, strict=True) if p >= 0.5],
                "probabilities": {name: float(p) for name, p in zip(names, row, strict=True)},
            }
            for row in _sigmoid(outputs)
        ]


def _sigmoid(outputs: Any) -> np.ndarray:
    # By tanh, which does not overflow.
    return 0.5 * (1 + np.tanh(0.5 * logits_of(outputs).astype(np.float64)))


_SCORES = ("score", "similarity", "rating", "stars", "value")


class Regression(TextTask):
    """A number for each text or pair of texts: similarity, rating, age. The loss is the squared error."""

    name = "regression"
    best_metric = "pearson"

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the text and number columns."""
        if data.labels:
            raise ConfigError(
                f"regression has numbers and no classes; leave data.labels out, not {data.labels}"
            )
        text, text_pair = find_texts(splits.train, data.text, data.text_pair)
        label = find_label(splits.train, data.label, (*_SCORES, *LABELS))
        if len(set(numbers(splits.train, label, "the training rows"))) < 2:
            raise ConfigError(f"all training rows have the same number in column {label!r}")
        return replace(data, text=text, text_pair=text_pair, label=label)

    def targets(self, rows: Dataset, data: DataConfig, where: str) -> list[float]:
        """The numbers."""
        assert data.label is not None
        return numbers(rows, data.label, where)

    def head(self, data: DataConfig) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def begin(self, model: PreTrainedModel, features: Dataset) -> None:
        """A new output starts at the mean of the numbers.

        From 0 all that the output reads is first pushed one way, and where the pooler saturates on that way
        (BERT's does) the model ends with one number for all rows.
        """
        mean, new = float(np.mean(features["labels"])), getattr(model, NEW_PARAMETERS, ())
        for name, parameter in model.named_parameters():
            if name in new and name.endswith("bias") and parameter.shape == (1,):
                with torch.no_grad():
                    parameter.fill_(mean)

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """Pearson's and Spearman's correlation, squared and absolute error."""
        return metrics.regression(logits_of(outcome.predictions)[:, 0], outcome.label_ids)

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """The number."""
        return [{"score": float(row[0])} for row in logits_of(outputs)]
