"""Causal language modelling: raw text, completions of prompts, and the assistant's turns of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorica.errors import FileError
from lorica.train.data.forms import describe_form, find_form, holds_messages
from lorica.train.data.forms.messages import said_by
from lorica.train.data.forms.templates import Laid, template_of
from lorica.train.data.rows import RowError, read_each
from lorica.train.data.splits import Splits
from lorica.train.settings import DataConfig
from lorica.train.tasks.base import Encoded
from lorica.train.tasks.conversations import (
    Piece,
    conversation_pieces,
    conversation_prompt,
    conversations_of,
    pieces_of,
)
from lorica.train.tasks.language import (
    GROUP,
    PROMPT_IDS,
    PROMPT_LENGTH,
    REFERENCE,
    LanguageTask,
    groups_of,
    references_of,
)
from lorica.train.tasks.packing import PackingCollator
from lorica.train.tasks.prompts import joined_texts, laid_out, prompts_of

_IGNORED = -100


@dataclass(frozen=True)
class TrainingText:
    """A row to learn from.

    Args:
        row: its place among the rows as they came.
        pieces: its tokens.
        group: rows of one group ask the same.
        reference: the text that its last targets stand for.
    """

    row: int
    pieces: list[Piece]
    group: int
    reference: str


class CausalLanguageModelling(LanguageTask):
    """The next token, of one of three kinds of rows.

    - A column of texts (``data.text``): rows are joined, with an end-of-text token between, and cut into
      blocks of `max_length` tokens; every token is a target, and none is lost.
    - A prompt (``data.text``, maybe with ``data.system`` before it and ``data.text_pair`` after it, a line
      break between) and its completion (``data.label``), or several (``data.references``): only the
      completion's tokens are targets (LoRA, equation 2). Between the two stands ``data.separator``.
    - A column of messages (``data.text``), each with a ``role`` and ``content``, or with ``from`` and
      ``value``: the tokenizer's chat template lays them out, and only what the assistant says is a target.
    """

    name = "causal-lm"
    task_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    packs = True

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the columns."""
        self.check_columns(splits.train, data)
        data = find_form(splits.train, data)
        return replace(data, messages=True) if _is_conversation(splits.train, data) else data

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> PackingCollator:
        """Pad tokens and targets to the longest row of the batch, or packed rows to the longest sequence."""
        pad: Any = tokenizer.pad_token_id
        return PackingCollator(super().collator(tokenizer), pad)

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
        """Tokenize; a row too long loses the start of its prompt first, then the end of its completion.

        In an evaluation the model writes from the prompt alone, cut by its own length and not by that of the
        right text.
        """
        assert data.text is not None
        limit = min(max_length, tokenizer.model_max_length)
        if _is_conversation(rows, data):
            asked = conversations_of(rows, data, where, labelled=True)
            made = read_each(asked, lambda row: conversation_pieces(tokenizer, *row), where)
            found = [
                TrainingText(row, pieces, row, said_by(messages))
                for row, ((messages, _), pieces) in enumerate(zip(asked, made, strict=True))
            ]
        elif data.template is not None and template_of(data.template, data.label).learns:
            laid = laid_out(rows, data, where, filled=True)
            found = [
                TrainingText(row, _framed(tokenizer, each), row, each.answer) for row, each in enumerate(laid)
            ]
        elif data.label is not None:
            prompts = prompts_of(rows, data, where, filled=True)
            texts = references_of(rows, data, where)
            found = [
                TrainingText(row, completion_pieces(tokenizer, prompt, text, data.separator), group, text)
                for row, (prompt, group) in enumerate(
                    zip(prompts, groups_of(rows, data, prompts), strict=True)
                )
                for text in texts[row]
            ]
        else:
            read = prompts_of if data.continues is None else joined_texts
            texts = [text for text in read(rows, data, where) if text.strip()]
            if data.streaming:  # rows of a batch have nothing to do with one another
                whole = [_start(tokenizer) + _tokens(tokenizer, text) + _end(tokenizer) for text in texts]
                found = [TrainingText(row, [(ids, True)], row, "") for row, ids in enumerate(whole)]
                return _rows(found, limit, where)
            return replace(_blocks(tokenizer, texts, limit, where), rows=len(texts))
        return _rows(found, limit, where)

    def encodes_apart(self, rows: Dataset, data: DataConfig) -> bool:
        """Of all but raw text, whose rows are joined."""
        laid = data.template is not None and template_of(data.template, data.label).learns
        return type(self) is CausalLanguageModelling and (
            data.label is not None or laid or _is_conversation(rows, data)
        )

    def groups(self, rows: Dataset, data: DataConfig, where: str) -> Sequence[int] | None:
        """Rows with the same prompt bear the place of the first of them."""
        laid = data.template is not None and template_of(data.template, data.label).learns
        if laid or _is_conversation(rows, data):
            return None
        return groups_of(rows, data, prompts_of(rows, data, where, filled=True))

    def notes(self, rows: Dataset, data: DataConfig) -> list[str]:
        """The form of the rows, and the number of empty texts left out, of raw text."""
        told = [f"its rows are {describe_form(rows, data)}"]
        laid = data.label is not None or data.template is not None or data.continues is not None
        laid = laid or data.streaming
        if laid or _is_conversation(rows, data):
            return told
        blank = sum(isinstance(text, str) and not text.strip() for text in rows[str(data.text)])
        return [*told, f"{blank:,} empty texts are left out"] if blank else told

    def prompts(
        self, rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
    ) -> list[list[int]]:
        """The prompt and the separator; a conversation up to where the assistant speaks; or the text."""
        assert data.text is not None
        if _is_conversation(rows, data):
            asked = conversations_of(rows, data, where, labelled=False)
            return read_each(asked, lambda row: conversation_prompt(tokenizer, *row), where)
        learns = data.template is not None and template_of(data.template, data.label).learns
        apart = "" if data.label is None or learns else data.separator
        # A byte-level tokenizer keeps a space with the word after it.
        texts = [
            (text + apart).rstrip(" ") if learns or apart else text for text in prompts_of(rows, data, where)
        ]
        return [_start(tokenizer) + _tokens(tokenizer, text) for text in texts]


def completion_pieces(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, separator: str
) -> list[Piece]:
    """The tokens of a prompt and of its completion, of which the latter are targets.

    Args:
        tokenizer: the model's.
        prompt: a text.
        completion: the text that follows; an end-of-text token follows it.
        separator: text between them.
    """
    # A byte-level tokenizer keeps a space with the word after it: one at the end goes to the completion.
    spaces = separator[len(separator.rstrip(" ")) :]
    return [
        (prompt_tokens(tokenizer, prompt, separator), False),
        (_tokens(tokenizer, spaces + completion) + _end(tokenizer), True),
    ]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, separator: str = "") -> list[int]:
    """The tokens that a model writes on from: a prompt and the separator, but for spaces at its end."""
    return _start(tokenizer) + _tokens(tokenizer, prompt + separator.rstrip(" "))


def _rows(found: list[TrainingText], limit: int, where: str) -> Encoded:
    names = ("input_ids", "attention_mask", "labels", "length", PROMPT_LENGTH, PROMPT_IDS, GROUP, REFERENCE)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    lengths: dict[int, int] = {}
    empty: list[int] = []
    for each in found:
        ids = [token for tokens, _ in each.pieces for token in tokens]
        labels = [token if target else _IGNORED for tokens, target in each.pieces for token in tokens]
        lengths[each.row] = max(len(ids), lengths.get(each.row, 0))
        prompt = next((i for i, label in enumerate(labels) if label != _IGNORED), len(labels))
        # A target needs a token before it to be predicted from.
        cut = min(max(len(ids) - limit, 0), max(prompt - 1, 0))
        ids, labels = ids[cut : cut + limit], labels[cut : cut + limit]
        if all(label == _IGNORED for label in labels[1:]):
            empty.append(each.row)
        last = max((place for place, (_, target) in enumerate(each.pieces) if target), default=0)
        asked = [token for tokens, _ in each.pieces[:last] for token in tokens]
        apart = None if asked == ids[: len(asked)] else asked[-limit:]
        values = (ids, [1] * len(ids), labels, len(ids), len(asked), apart, each.group, each.reference)
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    if empty:
        raise RowError(
            list(dict.fromkeys(empty)), where, "has nothing to learn: what is to be written is empty"
        )
    tokens = list(lengths.values())
    truncated = sum(length > limit for length in tokens)
    return Encoded(Dataset.from_dict(columns), truncated, max(tokens), rows=len(tokens), lengths=tokens)


def _blocks(tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int, where: str) -> Encoded:
    start, end = _start(tokenizer), _end(tokenizer)
    found = [start + _tokens(tokenizer, text) + end for text in texts]
    stream = [token for ids in found for token in ids]
    blocks = [stream[i : i + limit] for i in range(0, len(stream), limit)]
    if len(blocks[-1]) < 2:
        # One token alone predicts nothing.
        blocks.pop()
    if not blocks:
        raise FileError(
            f"there is no text to learn from in {where}: a token is predicted from those before it"
        )
    features = Dataset.from_dict(
        {
            "input_ids": blocks,
            "attention_mask": [[1] * len(block) for block in blocks],
            "labels": blocks,
            "length": [len(block) for block in blocks],
        }
    )
    lengths = [len(ids) for ids in found]
    return Encoded(features, 0, max(lengths), rows=len(texts), lengths=lengths)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that this tokenizer puts before every text, if any."""
    if tokenizer.bos_token_id is None:
        return []
    first: Any = tokenizer("a")["input_ids"][:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    token: Any = tokenizer.eos_token_id
    return [] if token is None else [token]


def _framed(tokenizer: PreTrainedTokenizerBase, laid: Laid) -> list[Piece]:
    """A text that a template laid out, between the tokens that begin and end a text, where it lacks them."""
    pieces = pieces_of(tokenizer, laid.text, laid.spans)
    start, end = _start(tokenizer), _end(tokenizer)
    if start and not laid.text.startswith(str(tokenizer.bos_token)):
        pieces.insert(0, (start, False))
    if end and not laid.text.endswith(str(tokenizer.eos_token)):
        pieces.append((end, bool(laid.spans) and laid.spans[-1][1] == len(laid.text)))
    return pieces


def _is_conversation(rows: Dataset, data: DataConfig) -> bool:
    """Whether the prompt or the answer is one of messages, which the chat template lays out."""
    if data.template is not None:
        return False
    if data.messages is not None:
        return data.messages
    return holds_messages(rows, data.text) or holds_messages(rows, data.label)
