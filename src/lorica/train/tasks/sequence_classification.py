"""Which class does a text, or a pair of texts, belong to?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError
from lorica.train import metrics
from lorica.train.columns import find_label, find_texts, label_ids, label_names
from lorica.train.data import Splits
from lorica.train.labels import read_otherwise
from lorica.train.recipe import DataConfig
from lorica.train.tasks.texts import TextTask, logits_of, named_outputs, softmax


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
        return read_otherwise(rows[str(data.label)], data.labels or [], str(data.label))

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
