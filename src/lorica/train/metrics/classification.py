"""Scores of classes, by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
    roc_auc_score,
)

# scikit-learn takes a number here, whatever its annotations say.
_ZERO: Any = 0


def classification(
    predictions: ArrayLike, labels: ArrayLike, probabilities: ArrayLike | None = None
) -> dict[str, float]:
    """Score predicted classes against the true ones.

    Args:
        predictions: (rows,) predicted class ids.
        labels: (rows,) true class ids.
        probabilities: (rows, classes) how likely each class was, in any unit that keeps their order within a
            class; None leaves ``roc_auc`` out.

    Returns:
        ``accuracy``; ``f1``, ``precision`` and ``recall`` weighted by how often each class occurs;
        ``f1_macro``, the plain mean over the classes; ``matthews``, the correlation coefficient, 0 at
        chance; ``roc_auc``, one class against the rest, the mean over the classes; of two
        classes with `probabilities`, ``f1_binary``, the second's alone, which GLUE reports. A class that is
        never predicted counts as precision 0.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    scores = {
        "accuracy": accuracy_score(labels, predictions),
        "f1": f1_score(labels, predictions, average="weighted", zero_division=_ZERO),
        "f1_macro": f1_score(labels, predictions, average="macro", zero_division=_ZERO),
        "precision": precision_score(labels, predictions, average="weighted", zero_division=_ZERO),
        "recall": recall_score(labels, predictions, average="weighted", zero_division=_ZERO),
        "matthews": _matthews(labels, predictions),
    }
    if probabilities is not None:
        odds = np.asarray(probabilities)
        truth = np.eye(odds.shape[-1])[labels.astype(int)]
        # Of two classes, either one's area is the other's.
        columns = slice(1, 2) if odds.shape[-1] == 2 else slice(None)
        scores |= _areas(odds[:, columns], truth[:, columns])
        if odds.shape[-1] == 2:
            scores["f1_binary"] = f1_score(labels, predictions, zero_division=_ZERO)
    return {name: float(score) for name, score in scores.items()}


def multi_label(probabilities: ArrayLike, labels: ArrayLike, threshold: float = 0.5) -> dict[str, float]:
    """Score rows that may have several classes, or none.

    Args:
        probabilities: (rows, classes) probability of each class.
        labels: (rows, classes) 1 where a row has the class, else 0.
        threshold: probability from which a class is predicted.

    Returns:
        ``accuracy``, the share of rows with every class right; ``f1_micro``, ``precision`` and ``recall``
        over all decisions together; ``f1_macro``, the mean over classes; ``roc_auc``, where it is defined.
    """
    odds, truth = np.asarray(probabilities), np.asarray(labels).astype(int)
    said = (odds >= threshold).astype(int)
    scores = {
        "accuracy": (said == truth).all(-1).mean(),
        "f1_micro": f1_score(truth, said, average="micro", zero_division=_ZERO),
        "f1_macro": f1_score(truth, said, average="macro", zero_division=_ZERO),
        "precision": precision_score(truth, said, average="micro", zero_division=_ZERO),
        "recall": recall_score(truth, said, average="micro", zero_division=_ZERO),
        **_areas(odds, truth),
    }
    return {name: float(score) for name, score in scores.items()}


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    # One value on both sides: scikit-learn warns, and the coefficient is 0 by definition.
    if len(np.union1d(labels, predictions)) < 2:
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def _areas(odds: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve, one class against the rest, the mean over classes with both kinds of rows."""
    areas = [
        roc_auc_score(true, odd)
        for odd, true in zip(odds.T, truth.T, strict=True)
        if 0 < true.sum() < len(true)
    ]
    return {"roc_auc": float(np.mean(areas))} if areas else {}
