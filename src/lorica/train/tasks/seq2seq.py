"""One text into another: translation, summary, any text to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError
from lorica.train.columns import check_texts, find_label, find_texts
from lorica.train.data import Splits
from lorica.train.recipe import DataConfig
from lorica.train.tasks.base import Encoded, Task, needs_tokens

_SOURCES = ("source", "input", "dialogue", "article", "document", "context", "text", "prompt")
_TARGETS = ("target", "output", "summary", "highlights", "completion", "translation", "label")


class SequenceToSequence(Task):
    """A text (``data.label``) made of another (``data.text``), by a model with an encoder and a decoder."""

    name = "seq2seq-lm"
    task_type = "SEQ_2_SEQ_LM"
    auto_class = "AutoModelForSeq2SeqLM"
    best_metric = "loss"
    reads_outputs = False

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the two columns."""
        if data.labels or data.text_pair:
            raise ConfigError(
                f"{self.name} has neither classes nor pairs; leave out data.labels and data.text_pair"
            )
        columns = {name.lower(): name for name in splits.train.column_names}
        usual = next((columns[name] for name in _SOURCES if name in columns), None)
        text, _ = find_texts(splits.train, data.text or usual, None)
        label = find_label(splits.train, data.label, _TARGETS, "text to write")
        if text == label:
            raise ConfigError(
                f"column {label!r} cannot be both read and written; name both with --data.text and "
                "--data.label"
            )
        return replace(data, text=text, label=label)

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
        """Tokenize both texts, without padding; count the rows of which either was too long."""
        assert data.text is not None
        assert data.label is not None
        check_texts(rows, [data.text, data.label] if labelled else [data.text], where)
        limit = min(max_length, tokenizer.model_max_length)
        sources = tokenizer(list(rows[data.text]), truncation=False, verbose=False)["input_ids"]
        features = dict(tokenizer(list(rows[data.text]), truncation=True, max_length=limit))
        needs_tokens(features["input_ids"], where)
        longest = [len(ids) for ids in sources]
        if labelled:
            texts = list(rows[data.label])
            targets = tokenizer(text_target=texts, truncation=False, verbose=False)["input_ids"]
            needs_tokens(targets, where)
            features["labels"] = tokenizer(text_target=texts, truncation=True, max_length=limit)["input_ids"]
            longest = [max(length, len(ids)) for length, ids in zip(longest, targets, strict=True)]
        features["length"] = [len(ids) for ids in features["input_ids"]]
        return Encoded(Dataset.from_dict(features), sum(n > limit for n in longest), max(longest))

    def head(self, data: DataConfig) -> dict[str, Any]:
        """The model's own."""
        return {}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
        """Pad both sides to the longest row of the batch."""
        return DataCollatorForSeq2Seq(tokenizer)

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """None but the loss and the perplexity, which the trainer computes."""
        return {}

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """A language model's logits say nothing by themselves.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.name} has no predictions; write text with the model's own generate: "
            "lorica.train.open_run(folder).model.generate(...)"
        )

    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """A row for each text."""
        return Dataset.from_dict({data.text: list(texts)})
