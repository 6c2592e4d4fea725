"""What the tasks that read a text, or a pair of texts, and answer with one output a row have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lorica.errors import ConfigError
from lorica.train.columns import check_texts
from lorica.train.recipe import DataConfig
from lorica.train.tasks.base import Encoded, Task, needs_tokens, padded_right


class TextTask(Task):
    """One output for each text or pair of texts. A subclass says what the labels are."""

    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"

    @abstractmethod
    def targets(self, rows: Dataset, data: DataConfig, where: str) -> list[Any]:
        """What is to be learned of each row, as the model takes it."""

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
        columns = self.inputs(data)
        check_texts(rows, columns, where, filled=labelled)
        texts = list(rows[columns[0]])
        pairs = list(rows[columns[1]]) if len(columns) == 2 else None
        limit = min(max_length, tokenizer.model_max_length)
        # Tokenized once in full, to know what was cut: it is a small part of the time that one epoch takes.
        lengths = [len(ids) for ids in tokenizer(texts, pairs, truncation=False, verbose=False)["input_ids"]]
        features = dict(tokenizer(texts, pairs, truncation=True, max_length=limit))
        needs_tokens(features["input_ids"], where)
        features["length"] = [len(ids) for ids in features["input_ids"]]
        if labelled:
            features["labels"] = self.targets(rows, data, where)
        truncated = sum(length > limit for length in lengths)
        return Encoded(Dataset.from_dict(features), truncated, max(lengths), lengths=lengths)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pad to the longest row of the batch."""
        return DataCollatorWithPadding(padded_right(tokenizer))

    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """A row for each text; a pair is given as two texts with a tab between."""
        return split_pairs(texts, self.inputs(data))


def split_pairs(texts: Sequence[str], columns: Sequence[str]) -> Dataset:
    """Rows of one or two columns; two texts have a tab between.

    Raises:
        ConfigError: a text is no pair where one is due.
    """
    if len(columns) == 1:
        return Dataset.from_dict({columns[0]: list(texts)})
    pairs = [text.split("\t") for text in texts]
    if bad := next((text for text, pair in zip(texts, pairs, strict=True) if len(pair) != 2), None):
        raise ConfigError(f"this model reads pairs: give two texts with a tab between them, not {bad!r}")
    return Dataset.from_dict({name: [pair[i] for pair in pairs] for i, name in enumerate(columns)})


def logits_of(outputs: Any) -> np.ndarray:
    """The logits (rows, ...): some models return hidden states beside them, after them."""
    return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    odds = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def named_outputs(names: Sequence[str], problem_type: str | None = None) -> dict[str, Any]:
    """Fields of a model's configuration for outputs with names."""
    fields: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return fields if problem_type is None else {**fields, "problem_type": problem_type}
