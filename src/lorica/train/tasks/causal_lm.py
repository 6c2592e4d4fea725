"""What comes next? Raw text, completions of prompts, and the assistant's turns of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError, FileError
from lorica.train.columns import check_texts, find_texts
from lorica.train.data import Splits
from lorica.train.recipe import DataConfig
from lorica.train.tasks.base import Encoded, Task
from lorica.train.tasks.conversations import conversation_pieces

_PAIRS = (
    ("prompt", "completion"),
    ("context", "completion"),
    ("instruction", "output"),
    ("prompt", "response"),
)
_CHATS = ("messages", "conversations", "conversation")
_IGNORED = -100

Piece = tuple[list[int], bool]
"""Tokens, and whether they are targets."""


class CausalLanguageModelling(Task):
    """The next token, of one of three kinds of rows.

    - A column of texts (``data.text``): rows are joined, with an end-of-text token between, and cut into
      blocks of `max_length` tokens; every token is a target, and none is lost.
    - A prompt (``data.text``) and its completion (``data.label``): only the completion's tokens are targets
      (LoRA, equation 2). Between the two stands ``data.separator``.
    - A column of messages (``data.text``), each with a ``role`` and ``content``: the tokenizer's chat
      template lays them out, and only what the assistant says is a target.
    """

    name = "causal-lm"
    task_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    best_metric = "loss"
    reads_outputs = False

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the columns."""
        rows = splits.train
        if data.labels or data.text_pair:
            raise ConfigError(
                f"{self.name} has neither classes nor pairs; leave out data.labels and data.text_pair"
            )
        if data.text is None and data.label is None:
            columns = {name.lower(): name for name in rows.column_names}
            for prompt, completion in _PAIRS:
                if prompt in columns and completion in columns:
                    return replace(data, text=columns[prompt], label=columns[completion])
            for name in _CHATS:
                if name in columns:
                    return replace(data, text=columns[name])
        if data.text is None and data.label is not None:
            raise ConfigError(
                f"data.label is {data.label!r}, the completion; name the prompt too, with data.text"
            )
        text, _ = find_texts(rows, data.text, data.label)
        return replace(data, text=text)

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
        """Tokenize; a row too long loses the start of its prompt first, then the end of its completion."""
        assert data.text is not None
        limit = min(max_length, tokenizer.model_max_length)
        if data.label is not None:
            check_texts(rows, [data.text, data.label], where)
            encoded = [
                self._completion(tokenizer, prompt, completion, data.separator)
                for prompt, completion in zip(rows[data.text], rows[data.label], strict=True)
            ]
        elif _holds_messages(rows, data.text):
            encoded = [
                conversation_pieces(tokenizer, messages, f"row {row + 1} of {where}")
                for row, messages in enumerate(rows[data.text])
            ]
        else:
            check_texts(rows, [data.text], where)
            return _blocks(tokenizer, list(rows[data.text]), limit, where)
        return _rows(encoded, limit, where)

    def head(self, data: DataConfig) -> dict[str, Any]:
        """The model's own."""
        return {}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
        """Pad tokens and targets to the longest row of the batch."""
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

    @staticmethod
    def _completion(
        tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, separator: str
    ) -> list[Piece]:
        # A byte-level tokenizer keeps a space with the word after it: one at the end goes to the completion.
        apart = separator.rstrip(" ")
        return [
            (_start(tokenizer) + _tokens(tokenizer, prompt + apart), False),
            (_tokens(tokenizer, separator[len(apart) :] + completion) + _end(tokenizer), True),
        ]


def _rows(encoded: list[list[Piece]], limit: int, where: str) -> Encoded:
    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], "length": []}
    lengths = []
    for row, pieces in enumerate(encoded):
        ids = [token for tokens, _ in pieces for token in tokens]
        labels = [token if target else _IGNORED for tokens, target in pieces for token in tokens]
        lengths.append(len(ids))
        prompt = next((i for i, label in enumerate(labels) if label != _IGNORED), len(labels))
        # A target needs a token before it to be predicted from.
        cut = min(max(len(ids) - limit, 0), max(prompt - 1, 0))
        ids, labels = ids[cut : cut + limit], labels[cut : cut + limit]
        if all(label == _IGNORED for label in labels[1:]):
            raise FileError(f"row {row + 1} of {where} has nothing to learn: its completion is empty")
        for name, value in zip(columns, (ids, [1] * len(ids), labels, len(ids)), strict=True):
            columns[name].append(value)
    truncated = sum(length > limit for length in lengths)
    return Encoded(Dataset.from_dict(columns), truncated, max(lengths))


def _blocks(tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int, where: str) -> Encoded:
    start, end = _start(tokenizer), _end(tokenizer)
    found = [start + _tokens(tokenizer, text) + end for text in texts]
    stream = [token for ids in found for token in ids]
    blocks = [stream[i : i + limit] for i in range(0, len(stream), limit)]
    if len(blocks[-1]) < 2:
        # One token alone predicts nothing.
        blocks.pop()
    if not blocks:
        raise FileError(f"{where} hold no text to learn from")
    features = Dataset.from_dict(
        {
            "input_ids": blocks,
            "attention_mask": [[1] * len(block) for block in blocks],
            "labels": blocks,
            "length": [len(block) for block in blocks],
        }
    )
    return Encoded(features, 0, max(map(len, found)), rows=len(texts))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that this tokenizer puts before every text, if any."""
    first: Any = tokenizer("a")["input_ids"][:1]
    return list(first) if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    token: Any = tokenizer.eos_token_id
    return [] if token is None else [token]


def _holds_messages(rows: Dataset, column: str) -> bool:
    return column in rows.column_names and getattr(rows.features[column], "dtype", None) not in (
        "string",
        "large_string",
    )
