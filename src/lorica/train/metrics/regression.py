"""Scores of numbers, by scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


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
