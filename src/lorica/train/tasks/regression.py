"""How much? A number for each text or pair of texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError
from lorica.train import metrics
from lorica.train.columns import LABELS, find_label, find_texts, numbers
from lorica.train.data import Splits
from lorica.train.recipe import DataConfig
from lorica.train.tasks.base import NEW
from lorica.train.tasks.texts import TextTask, logits_of

_SCORES = ("score", "similarity", "rating", "stars", "value")


class Regression(TextTask):
    """A number for each text or pair of texts: similarity, rating, age. The loss is the squared error."""

    name = "regression"
    best_metric = "pearson"

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the text and number columns."""
        if data.labels:
            raise ConfigError(
                f"regression has numbers and no classes; leave data.labels out, not {data.labels}"
            )
        text, text_pair = find_texts(splits.train, data.text, data.text_pair)
        label = find_label(splits.train, data.label, (*_SCORES, *LABELS))
        if len(set(numbers(splits.train, label, "the training rows"))) < 2:
            raise ConfigError(f"all training rows have the same number in column {label!r}")
        return replace(data, text=text, text_pair=text_pair, label=label)

    def targets(self, rows: Dataset, data: DataConfig, where: str) -> list[float]:
        """The numbers."""
        assert data.label is not None
        return numbers(rows, data.label, where)

    def head(self, data: DataConfig) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def begin(self, model: PreTrainedModel, features: Dataset) -> None:
        """A new output starts at the mean of the numbers.

        From 0 all that the output reads is first pushed one way, and where the pooler saturates on that way
        (BERT's does) the model ends with one number for all rows.
        """
        mean, new = float(np.mean(features["labels"])), getattr(model, NEW, ())
        for name, parameter in model.named_parameters():
            if name in new and name.endswith("bias") and parameter.shape == (1,):
                with torch.no_grad():
                    parameter.fill_(mean)

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """Pearson's and Spearman's correlation, squared and absolute error."""
        return metrics.regression(logits_of(outcome.predictions)[:, 0], outcome.label_ids)

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """The number."""
        return [{"score": float(row[0])} for row in logits_of(outputs)]
