"""Which class does a text, or a pair of texts, belong to?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError
from lorica.train import metrics
from lorica.train.columns import check_texts, find_label, find_texts, label_ids, label_names
from lorica.train.data import Splits
from lorica.train.recipe import DataConfig
from lorica.train.tasks.base import Encoded, Task


class SequenceClassification(Task):
    """One class for each text or pair of texts: sentiment, topic, entailment."""

    name = "sequence-classification"
    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    best_metric = "accuracy"

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the text and label columns, and the classes' names."""
        text, text_pair = find_texts(splits.train, data.text, data.text_pair)
        label = find_label(splits.train, data.label)
        if label in (text, text_pair):
            raise ConfigError(
                f"column {label!r} cannot be both text and label; name both with --data.text and --data.label"
            )
        labels = data.labels or label_names(splits.train, label)
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ConfigError(f"data.labels must name at least two classes, each once, not {labels}")
        if len(set(label_ids(splits.train, label, labels, "the training rows"))) < 2:
            raise ConfigError(
                f"all training rows have the same label in column {label!r}; classification needs at least "
                "two classes"
            )
        return replace(data, text=text, text_pair=text_pair, label=label, labels=labels)

    def encode(
        self,
        rows: Dataset,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        where: str,
        *,
        labelled: bool = True,
    ) -> Encoded:
        """Tokenize the texts, without padding; count those that were too long."""
        columns = [name for name in (data.text, data.text_pair) if name is not None]
        check_texts(rows, columns, where)
        texts = list(rows[columns[0]])
        pairs = list(rows[columns[1]]) if len(columns) == 2 else None
        limit = min(max_length, tokenizer.model_max_length)
        # Tokenized once in full, to know what was cut: it is a small part of the time that one epoch takes.
        lengths = [len(ids) for ids in tokenizer(texts, pairs, truncation=False, verbose=False)["input_ids"]]
        features = dict(tokenizer(texts, pairs, truncation=True, max_length=limit))
        features["length"] = [len(ids) for ids in features["input_ids"]]
        if labelled:
            if data.label not in rows.column_names:
                raise ConfigError(
                    f"{where} have no label column {data.label!r}; they have: {', '.join(rows.column_names)}"
                )
            features["labels"] = label_ids(rows, data.label, data.labels or [], where)
        return Encoded(Dataset.from_dict(features), sum(length > limit for length in lengths), max(lengths))

    def head(self, data: DataConfig) -> dict[str, Any]:
        """As many outputs as classes, with their names."""
        names = data.labels or []
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pad to the longest row of the batch."""
        return DataCollatorWithPadding(tokenizer)

    def metrics(self, outcome: EvalPrediction) -> dict[str, float]:
        """Accuracy, F1, precision and recall of the most likely classes."""
        return metrics.classification(_logits(outcome.predictions).argmax(-1), outcome.label_ids)

    def read(self, outputs: Any, data: DataConfig) -> list[dict[str, Any]]:
        """The most likely class, its probability, and those of all classes."""
        logits = _logits(outputs).astype(np.float64)
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        names = data.labels or []
        return [
            {
                "label": names[int(row.argmax())],
                "probability": float(row.max()),
                "probabilities": {name: float(p) for name, p in zip(names, row, strict=True)},
            }
            for row in odds / odds.sum(-1, keepdims=True)
        ]

    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """A row for each text; a pair is given as two texts with a tab between."""
        if data.text_pair is None:
            return Dataset.from_dict({data.text: list(texts)})
        pairs = [text.split("\t") for text in texts]
        if bad := next((text for text, pair in zip(texts, pairs, strict=True) if len(pair) != 2), None):
            raise ConfigError(f"this model reads pairs: give two texts with a tab between them, not {bad!r}")
        return Dataset.from_dict(
            {data.text: [pair[0] for pair in pairs], data.text_pair: [pair[1] for pair in pairs]}
        )


def _logits(outputs: Any) -> np.ndarray:
    # Some models return hidden states beside the logits; the logits come first.
    return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
