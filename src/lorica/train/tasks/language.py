"""What the tasks have in common whose answer is a text: its tokens are the targets, and it can be written."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError
from lorica.train.columns import check_texts
from lorica.train.recipe import DataConfig
from lorica.train.rows import Unusable, read_each
from lorica.train.tasks.base import Task, padded_right


class LanguageTask(Task):
    """Learns to write a text. A subclass says what of a row is read, and what is written.

    A row has one text that would be right, in the label column, or several, in the column
    ``data.references``: it is then learned, or scored, once with each.
    """

    best_metric = "loss"
    reads_outputs = False
    writes = True

    @abstractmethod
    def prompts(
        self, rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
    ) -> list[list[int]]:
        """Tokens that the model writes on from, for each row, uncut."""

    def head(self, data: DataConfig) -> dict[str, Any]:
        """The model's own."""
        return {}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
        """Pad tokens and targets to the longest row of the batch."""
        return DataCollatorForSeq2Seq(padded_right(tokenizer))

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """None but the loss and the perplexity, which the trainer computes."""
        return {}

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """The text that was written for each row."""
        return [{"generated": text} for text in outputs]

    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """A row for each text."""
        return Dataset.from_dict({data.text: list(texts)})

    def check_columns(self, data: DataConfig) -> None:
        """Refuse what belongs to other tasks.

        Raises:
            ConfigError: there are classes or pairs.
        """
        if data.labels or data.text_pair:
            raise ConfigError(
                f"{self.name} has neither classes nor pairs; leave out data.labels and data.text_pair"
            )


def references_of(rows: Dataset, data: DataConfig, where: str) -> list[list[str]]:
    """The texts that would be right, of each row.

    Raises:
        ConfigError: there is neither the column of texts nor that of lists of them.
        RowError: rows have no text.
    """
    assert data.label is not None
    if data.references not in rows.column_names:
        check_texts(rows, [data.label], where)
        return [[text] for text in rows[data.label]]
    single = rows[data.label] if data.label in rows.column_names else [None] * len(rows)

    def read(value: tuple[Any, Any]) -> list[str]:
        texts, text = value
        # Public sets leave the list of a training row empty, and give the one text beside it.
        right = list(texts) if isinstance(texts, list) and texts else [text]
        if not all(isinstance(each, str) for each in right):
            raise Unusable(f"has {right!r:.60} in column {data.references!r}, where texts are due")
        return right

    return read_each(zip(rows[data.references], single, strict=True), read, where)


def groups_of(rows: Dataset, data: DataConfig) -> list[int]:
    """Which rows ask the same: rows of one text each are one question if they read the same."""
    if data.references in rows.column_names:
        return list(range(len(rows)))
    first: dict[str, int] = {}
    assert data.text is not None
    return [first.setdefault(str(value), row) for row, value in enumerate(rows[data.text])]
