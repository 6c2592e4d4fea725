"""Scores of an evaluation: of a model that diverged, of a classifier and the baseline that it has to beat.

A classifier has to beat calling every row the most frequent class, and is asked whether it does just that.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalPrediction

from lorica.train.tasks import Task
from lorica.train.tasks.texts import logits_of

Score = Callable[[EvalPrediction, Dataset], dict[str, float]]
"""Makes metrics of a model's outputs and the encoded rows."""


def scored(score: Score, outcome: EvalPrediction, rows: Dataset) -> dict[str, float]:
    """The metrics; none is a number where the model has diverged, since NaNs stand for no class."""
    given = outcome.predictions
    parts = given if isinstance(given, tuple) else (given,)
    if not any(_diverged(part) for part in parts):
        return score(outcome, rows)
    numbers: Any = tuple(np.nan_to_num(p) if _diverged(p) else p for p in parts)
    outcome.predictions = numbers if isinstance(given, tuple) else numbers[0]
    return dict.fromkeys(score(outcome, rows), math.nan)


def _diverged(part: Any) -> bool:
    # Models write -inf for what is out of the question.
    return isinstance(part, np.ndarray) and part.dtype.kind == "f" and not (part < np.inf).all()


def back_in_order(read: Any, order: Sequence[int] | None) -> Any:
    """Put values that were read in another order back in their own.

    Args:
        read: arrays (rows, ...), also in tuples and dictionaries; None stays None.
        order: places of the rows in the order in which they were read; None is their own.
    """
    if read is None or order is None:
        return read
    if isinstance(read, Mapping):
        return {name: back_in_order(value, order) for name, value in read.items()}
    if isinstance(read, (list, tuple)):
        return tuple(back_in_order(value, order) for value in read)
    return read[np.argsort(order)]


def majority(task: Task, model: PreTrainedModel, train: Dataset, rows: Dataset) -> dict[str, float]:
    """Scores of calling every row the most frequent training class; empty where rows have no single class.

    Args:
        task: the task.
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
        task: the task.
        model: the model.

    Attributes:
        only: name of the class that all rows were called in the last evaluation, or None.
    """

    def __init__(self, task: Task, model: PreTrainedModel) -> None:
        """Nothing is scored yet."""
        self.only: str | None = None
        self._metrics: Score = task.metrics
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
