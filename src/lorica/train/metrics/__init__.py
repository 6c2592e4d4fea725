"""Metrics over a whole set of predictions, by well-kept libraries; a mean over batches is another number.

One module a family: `classification`, `regression`, `tagging`, `question_answering`; of written text
`ngrams`, `rouge`, `captions` and `sql`, which `written` knows by name.
"""

from __future__ import annotations

from lorica.train.metrics.classification import classification, multi_label
from lorica.train.metrics.question_answering import question_answering
from lorica.train.metrics.regression import regression
from lorica.train.metrics.tagging import tagging
from lorica.train.metrics.written import written

__all__ = ["classification", "multi_label", "question_answering", "regression", "tagging", "written"]
