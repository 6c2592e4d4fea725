"""One text into another: translation, summary, any text to text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorica.errors import ConfigError
from lorica.train.columns import check_texts, find_label, find_texts
from lorica.train.data import Splits
from lorica.train.generation.scoring import GROUP, PROMPT, REFERENCE
from lorica.train.recipe import DataConfig
from lorica.train.tasks.base import Encoded, needs_tokens
from lorica.train.tasks.language import LanguageTask, groups_of, references_of

_SOURCES = ("source", "input", "dialogue", "article", "document", "context", "text", "prompt")
_TARGETS = ("target", "output", "summary", "highlights", "completion", "translation", "label")


class SequenceToSequence(LanguageTask):
    """A text (``data.label``) made of another (``data.text``), by a model with an encoder and a decoder."""

    name = "seq2seq-lm"
    task_type = "SEQ_2_SEQ_LM"
    auto_class = "AutoModelForSeq2SeqLM"

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the two columns."""
        self.check_columns(data)
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
        limit = min(max_length, tokenizer.model_max_length)
        whole = self.prompts(rows, data, tokenizer, where)
        needs_tokens(whole, where)
        sources = tokenizer(list(rows[data.text]), truncation=True, max_length=limit)["input_ids"]
        right, groups = references_of(rows, data, where), groups_of(rows, data)
        places = [row for row, texts in enumerate(right) for _ in texts]
        texts = [text for texts in right for text in texts]
        targets = tokenizer(text_target=texts, truncation=False, verbose=False)["input_ids"]
        needs_tokens(targets, where)
        ids = [sources[row] for row in places]
        features: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": [[1] * len(tokens) for tokens in ids],
            "labels": tokenizer(text_target=texts, truncation=True, max_length=limit)["input_ids"],
            "length": [len(tokens) for tokens in ids],
            PROMPT: [len(tokens) for tokens in ids],
            GROUP: [groups[row] for row in places],
            REFERENCE: texts,
        }
        longest = [len(tokens) for tokens in whole]
        for row, tokens in zip(places, targets, strict=True):
            longest[row] = max(longest[row], len(tokens))
        truncated = sum(n > limit for n in longest)
        return Encoded(Dataset.from_dict(features), truncated, max(longest), rows=len(rows), lengths=longest)

    def prompts(
        self, rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
    ) -> list[list[int]]:
        """The text that is read."""
        assert data.text is not None
        check_texts(rows, [data.text], where)
        return [list(ids) for ids in tokenizer(list(rows[data.text]), verbose=False)["input_ids"]]
