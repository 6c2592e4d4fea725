"""Scores of classes, numbers and tagged spans, by scikit-learn, scipy and seqeval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    matthews_corrcoef,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
    roc_auc_score,
)

from lorica.errors import require

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
        ``accuracy``; ``f1``, ``precision`` and ``recall`` weighted by each class's number of rows;
        ``f1_macro``, the plain mean over the classes; ``matthews``, the correlation coefficient, 0 at
        chance; ``roc_auc``, one class against the rest, the mean over the classes; of two
        classes with `probabilities`, ``f1_binary``, the second's alone, which GLUE reports. A class that is
        never predicted counts as precision 0.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    # One call for all averages: each call checks its arguments for longer than it counts.
    by_class: Any = precision_recall_fscore_support(labels, predictions, zero_division=_ZERO)
    precision, recall, f1, rows = by_class
    scores = {
        "accuracy": accuracy_score(labels, predictions),
        "f1": np.average(f1, weights=rows),
        "f1_macro": f1.mean(),
        "precision": np.average(precision, weights=rows),
        "recall": np.average(recall, weights=rows),
        "matthews": _matthews(labels, predictions),
    }
    if probabilities is not None:
        odds = np.asarray(probabilities)
        truth = np.eye(odds.shape[-1])[labels.astype(int)]
        # Of two classes, either one's area is the other's.
        columns = slice(1, 2) if odds.shape[-1] == 2 else slice(None)
        scores |= _areas(odds[:, columns], truth[:, columns])
        if odds.shape[-1] == 2:
            scores["f1_binary"] = f1[
                np.union1d(labels, predictions) == 1
            ].sum()  # 0 where nothing is of the second class
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


def regression(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Score predicted numbers against the true ones.

    Args:
        predictions: (rows,) predicted numbers.
        labels: (rows,) true numbers.

    Returns:
        ``pearson`` and ``spearman``, the correlation of the numbers and of their ranks, 0 where either side
        is constant; ``mse`` and ``mae``, the mean squared and absolute error.
    """
    said, true = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    # scipy returns a named pair, whatever its annotations say.
    pearson: Any = stats.pearsonr
    spearman: Any = stats.spearmanr
    constant = len(said) < 2 or np.ptp(said) == 0 or np.ptp(true) == 0
    scores = {
        "pearson": 0.0 if constant else pearson(said, true).statistic,
        "spearman": 0.0 if constant else spearman(said, true).statistic,
        "mse": np.mean((said - true) ** 2),
        "mae": np.mean(np.abs(said - true)),
    }
    return {name: float(score) for name, score in scores.items()}


OUTSIDE = "O"


def marks_spans(names: Sequence[str]) -> bool:
    """Whether classes of words say which words belong together: IOB, BIO2 or IOBES."""
    inside = [name for name in names if name != OUTSIDE]
    return bool(inside) and all(name[:2] in ("B-", "I-", "E-", "S-") and len(name) > 2 for name in inside)


def seqeval() -> Any:
    """The library's module of metrics.

    Raises:
        MissingExtra: it is not installed.
    """
    return require("seqeval.metrics.sequence_labeling", extra="train")


def tagging(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compare tagged spans with the true ones: a span counts where its kind and both its ends are right.

    Args:
        predictions: (rows, words) a tag for each word, such as ``B-PER``, ``I-PER`` and ``O``.
        labels: (rows, words) the true tags.

    Returns:
        ``f1``, ``precision`` and ``recall`` over all spans of the set, as CoNLL-2000's script counts them;
        ``accuracy``, the share of words whose tag is right.
    """
    said, true = [list(row) for row in predictions], [list(row) for row in labels]
    precision, recall, f1, _ = seqeval().precision_recall_fscore_support(
        true, said, average="micro", zero_division=0
    )
    accuracy = seqeval().accuracy_score(true, said)
    scores = {"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy}
    return {name: float(score) for name, score in scores.items()}


def spans(tags: Sequence[str]) -> list[dict[str, Any]]:
    """The tagged spans of a text, in order.

    Args:
        tags: (words,) a tag for each word.

    Returns:
        ``label``, such as ``PER``, and the places of the words from ``start`` up to, not including, ``end``.
    """
    return [
        {"label": label, "start": first, "end": last + 1}
        for label, first, last in seqeval().get_entities(list(tags))
    ]
