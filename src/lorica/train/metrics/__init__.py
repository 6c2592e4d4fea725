"""Metrics over a whole set of predictions, by well-kept libraries; a mean over batches is another number.

One module a family: `classification`, `regression`, `tagging`, `answers`, `text`, `sql`.
"""

from __future__ import annotations

from lorica.train.metrics.classification import classification, multi_label
from lorica.train.metrics.regression import regression

__all__ = ["classification", "multi_label", "regression"]
