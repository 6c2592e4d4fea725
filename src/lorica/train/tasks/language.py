"""Tasks whose answer is a text: its tokens are the targets, and a model writes it. Here: text to text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError, listing
from lorica.train.data.columns import find_label, find_texts, needs_column
from lorica.train.data.forms.known import CHATS, FORMS, add_parts, find_prompt, find_templated
from lorica.train.data.forms.templates import template_of
from lorica.train.data.rows import Unusable, parsed_cell, read_each
from lorica.train.data.splits import Splits
from lorica.train.settings import DataConfig
from lorica.train.tasks.base import Encoded, Task, needs_tokens, padded_right
from lorica.train.tasks.prompts import filled_text, prompt_columns, prompts_of

if TYPE_CHECKING:
    from lorica.train.tasks.base import Task


PROMPT_LENGTH, GROUP, REFERENCE = "prompt_tokens", "group", "reference"
"""Columns of encoded rows that the model does not see: how many of the tokens are the prompt, which rows ask
the same, and the text that this row holds for it."""

PROMPT_IDS = "prompt_ids"
"""A column more, where rows are cut: the prompt's tokens, where the row's own do not begin with them."""


def reads_chats(data: DataConfig) -> bool:
    """Whether what is asked is a conversation: as was found, or by its column's name in earlier recipes."""
    return data.label is None and data.text in CHATS if data.messages is None else data.messages


class LanguageTask(Task):
    """Learns to write a text. A subclass says what of a row is read, and what is written.

    A row has one text that would be right, in the label column, or several, in the column
    ``data.references``: it is then learned, or scored, once with each.
    """

    best_metric = "loss"
    reads_outputs = False
    writes = True
    groups_lengths = False

    @abstractmethod
    def prompts(
        self, rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
    ) -> list[list[int]]:
        """Tokens that the model writes on from, for each row, uncut."""

    def head(self, data: DataConfig) -> dict[str, Any]:
        """The model's own."""
        return {}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Pad tokens and targets to the longest row of the batch."""
        return DataCollatorForSeq2Seq(padded_right(tokenizer))

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """None but the loss and the perplexity, which the trainer computes."""
        return {}

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """The text that was written for each row."""
        return [{"generated": text} for text in outputs]

    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """A row for each text; where conversations were learned, it is what a user says."""
        column = data.text or "prompt"
        if reads_chats(data):
            return Dataset.from_dict({column: [[{"role": "user", "content": text}] for text in texts]})
        return Dataset.from_dict({column: list(texts)})

    def inputs(self, data: DataConfig) -> list[str]:
        """Columns that the prompt is made of."""
        return prompt_columns(data)

    def check_columns(self, rows: Dataset, data: DataConfig) -> None:
        """Refuse settings of other tasks, and named columns that are not there.

        Raises:
            ConfigError: there are classes, or no such column.
        """
        if data.labels:
            raise ConfigError(
                f"{self.name} has neither classes nor pairs; leave out data.labels. data.text_pair is the "
                "second "
                "part of a prompt"
            )
        if data.template is not None:
            return
        if data.text is None and (data.label or data.text_pair):
            given = {"data.label": data.label, "data.text_pair": data.text_pair}
            told = listing(f"{name} is {value!r}" for name, value in given.items() if value)
            raise ConfigError(f"{told}; name the prompt too, with data.text")
        named = [data.system, data.text, data.text_pair]
        named += [] if data.references in rows.column_names else [data.label]
        for name in named:
            if name is not None:
                needs_column(rows, name, "the training rows")


def references_of(rows: Dataset, data: DataConfig, where: str) -> list[list[str]]:
    """The texts that would be right, of each row.

    Raises:
        ConfigError: there is neither the column of texts nor that of lists of them.
        RowError: rows have no text, or an empty one.
    """
    assert data.label is not None
    column = str(data.label)
    if data.references not in rows.column_names:
        needs_column(rows, column, where)
        return [[text] for text in read_each(rows[column][:], partial(filled_text, column=column), where)]
    single = rows[column] if column in rows.column_names else [None] * len(rows)

    def read(value: tuple[Any, Any]) -> list[str]:
        texts, text = parsed_cell(value[0]), value[1]
        # Public sets leave the list of a training row empty, and give the one text beside it.
        right = list(texts) if isinstance(texts, list) and texts else [text]
        if not all(isinstance(each, str) for each in right):
            raise Unusable(f"has {right!r:.60} in column {data.references!r}, where texts are due")
        return [filled_text(each, data.references) for each in right]

    return read_each(zip(rows[data.references], single, strict=True), read, where)


def groups_of(rows: Dataset, data: DataConfig, prompts: Sequence[str]) -> list[int]:
    """The number of each row's question; rows of one text each share it if their prompts read the same."""
    if data.references in rows.column_names:
        return list(range(len(rows)))
    first: dict[str, int] = {}
    return [first.setdefault(prompt, row) for row, prompt in enumerate(prompts)]


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
        if data.template is not None:
            data = find_templated(rows, data)
            if data.label is None or template_of(str(data.template), data.label).learns:
                raise ConfigError(
                    "a template for seq2seq-lm lays out what is read; name the column that is written with "
                    "--data.label, and leave it out of the template"
                )
            needs_column(rows, data.label, "the training rows")
            return data
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
            PROMPT_LENGTH: [len(tokens) for tokens in ids],
            GROUP: [groups[row] for row in places],
            REFERENCE: texts,
        }
        longest = [len(tokens) for tokens in whole]
        for row, tokens in zip(places, targets, strict=True):
            longest[row] = max(longest[row], len(tokens))
        truncated = sum(n > limit for n in longest)
        return Encoded(Dataset.from_dict(features), truncated, max(longest), rows=len(rows), lengths=longest)

    def encodes_apart(self, rows: Dataset, data: DataConfig) -> bool:
        """True."""
        return type(self) is SequenceToSequence

    def groups(self, rows: Dataset, data: DataConfig, where: str) -> Sequence[int] | None:
        """Rows with the same prompt bear the place of the first of them."""
        return groups_of(rows, data, prompts_of(rows, data, where, filled=True))

    def prompts(
        self, rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
    ) -> list[list[int]]:
        """The text that is read."""
        return [list(ids) for ids in tokenizer(prompts_of(rows, data, where), verbose=False)["input_ids"]]
