"""Metrics over a whole set of predictions, by scikit-learn; a mean over batches is another number."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score


def classification(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Score predicted classes against the true ones.

    Args:
        predictions: (rows,) predicted class ids.
        labels: (rows,) true class ids.

    Returns:
        ``accuracy``; ``f1``, ``precision`` and ``recall`` weighted by how often each class occurs;
        ``f1_macro``, the plain mean over the classes. A class that is never predicted counts as precision 0.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    # scikit-learn takes a number here, whatever its annotations say.
    zero: Any = 0
    scores = {
        "accuracy": accuracy_score(labels, predictions),
        "f1": f1_score(labels, predictions, average="weighted", zero_division=zero),
        "f1_macro": f1_score(labels, predictions, average="macro", zero_division=zero),
        "precision": precision_score(labels, predictions, average="weighted", zero_division=zero),
        "recall": recall_score(labels, predictions, average="weighted", zero_division=zero),
    }
    return {name: float(score) for name, score in scores.items()}
