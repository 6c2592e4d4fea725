"""What a classifier has to beat: calling every row the most frequent class. And whether it does just that."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalPrediction

from lorica.train.tasks import Task
from lorica.train.tasks.texts import logits_of


def majority(task: Task, model: PreTrainedModel, train: Dataset, rows: Dataset) -> dict[str, float]:
    """Scores of calling every row the class that most training rows have; empty where no row has one class.

    Args:
        task: what is learned.
        model: the model, which knows its classes.
        train: encoded rows to learn from.
        rows: encoded rows to score.
    """
    if not _classifies(model) or "labels" not in rows.column_names:
        return {}
    counts = np.bincount(np.asarray(train["labels"][:]), minlength=int(model.config.num_labels or 0))
    logits = np.zeros((len(rows), len(counts)))
    logits[:, counts.argmax()] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some metrics say that a class was never called
        return task.metrics(EvalPrediction(predictions=logits, label_ids=np.asarray(rows["labels"][:])), rows)


class Scoring:
    """A task's metrics, which notes whether a classifier calls all rows the same.

    Args:
        task: what is learned.
        model: the model.

    Attributes:
        only: name of the class that all rows were called in the last evaluation, or None.
    """

    def __init__(self, task: Task, model: PreTrainedModel) -> None:
        """Nothing is scored yet."""
        self.only: str | None = None
        self._metrics: Callable[[EvalPrediction, Dataset], dict[str, float]] = task.metrics
        self._names: Any = model.config.id2label if _classifies(model) else None

    def __call__(self, outcome: EvalPrediction, rows: Dataset) -> dict[str, float]:
        """The metrics."""
        self.only = None
        if self._names is not None:
            called = np.unique(logits_of(outcome.predictions).argmax(-1))
            if len(called) == 1 and len(rows) > 1:
                self.only = str(self._names.get(int(called[0]), called[0]))
        return self._metrics(outcome, rows)


def _classifies(model: PreTrainedModel) -> bool:
    return getattr(model.config, "problem_type", None) == "single_label_classification"
