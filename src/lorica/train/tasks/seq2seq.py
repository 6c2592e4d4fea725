"""One text into another: translation, summary, any text to text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorica.errors import ConfigError
from lorica.train.columns import find_label, find_texts
from lorica.train.data import Splits
from lorica.train.generation.scoring import GROUP, PROMPT, REFERENCE
from lorica.train.recipe import DataConfig
from lorica.train.tasks.base import Encoded, needs_tokens
from lorica.train.tasks.language import LanguageTask, groups_of, references_of
from lorica.train.tasks.prompts import FORMS, add_parts, find_prompt, prompts_of

_TARGETS = ("target", "output", "summary", "highlights", "completion", "translation", "label")
_SOURCES = ("source", "input", "dialogue", "article", "document", "context", "text", "prompt")
_FORMS = (
    *FORMS,
    *((source, target) for source in _SOURCES for target in _TARGETS),
)


class SequenceToSequence(LanguageTask):
    """A text (``data.label``) made of another (``data.text``), by a model with an encoder and a decoder.

    The text that is read may have parts: ``data.system`` before it, ``data.text_pair`` after it.
    """

    name = "seq2seq-lm"
    task_type = "SEQ_2_SEQ_LM"
    auto_class = "AutoModelForSeq2SeqLM"

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the two columns."""
        rows = splits.train
        self.check_columns(rows, data)
        if data.text is None and data.label is None and (found := find_prompt(rows, data, _FORMS)):
            return found
        text, _ = find_texts(rows, data.text, None)
        label = find_label(rows, data.label, _TARGETS, "text to write")
        if text == label:
            raise ConfigError(
                f"column {label!r} cannot be both read and written; name both with --data.text and "
                "--data.label"
            )
        return add_parts(rows, replace(data, text=text, label=label))

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
        limit = min(max_length, tokenizer.model_max_length)
        prompts = prompts_of(rows, data, where, filled=True)
        whole = tokenizer(prompts, verbose=False)["input_ids"]
        needs_tokens(whole, where)
        sources = tokenizer(prompts, truncation=True, max_length=limit)["input_ids"]
        right, groups = references_of(rows, data, where), groups_of(rows, data, prompts)
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
        return [list(ids) for ids in tokenizer(prompts_of(rows, data, where), verbose=False)["input_ids"]]
