"""Metrics over a whole set of predictions, by well-kept libraries; a mean over batches is another number.

`predictions` scores classes, numbers and tagged spans; `written` scores texts and short answers, by metrics
that it knows by name, of which those in `captions` need Java.
"""

from __future__ import annotations

from lorica.train.metrics.predictions import classification, multi_label, regression, tagging
from lorica.train.metrics.written import question_answering, written

__all__ = ["classification", "multi_label", "question_answering", "regression", "tagging", "written"]
