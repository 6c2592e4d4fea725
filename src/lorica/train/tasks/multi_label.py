"""Which classes does a text have? Several, one, or none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError, listing
from lorica.train import metrics
from lorica.train.cells import structured
from lorica.train.columns import find_label, find_texts, label_list_ids, label_list_names, numbers
from lorica.train.data import Splits
from lorica.train.labels import read_otherwise
from lorica.train.recipe import DataConfig
from lorica.train.rows import RowError
from lorica.train.tasks.texts import TextTask, logits_of, named_outputs


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
        values = (item for items in rows[data.label] for item in structured(items) or [])
        return read_otherwise(values, data.labels or [], data.label)

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
