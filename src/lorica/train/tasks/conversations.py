"""Conversations by the tokenizer's chat template: their tokens, and which of these the assistant says.

template's own mask     {% generation %} ... {% endgeneration %} in the template say it
growing                 layout of n messages ──▶ of n + 1: what is added is the new message's
probing                 the template changes earlier turns when one is added (it drops their reasoning, say):
                        another answer in the place of one; where the layouts differ, there it stands
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorica.errors import ConfigError
from lorica.train.data.columns import needs_column
from lorica.train.data.forms.messages import (
    ASSISTANT,
    LEARNED,
    Message,
    Tools,
    alike,
    as_messages,
    as_tools,
    learned,
)
from lorica.train.data.rows import Unusable, of_column, parsed_cell, read_each
from lorica.train.settings import DataConfig

Piece = tuple[list[int], bool]
"""Tokens, and whether they are targets."""

_MARK = "\ue9a1lorica\ue9a2"
"""An answer that nobody gives: letters of Unicode's private part stand around it."""

_OWN_MASK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversations_of(
    rows: Dataset, data: DataConfig, where: str, *, labelled: bool
) -> list[tuple[list[Message], Tools]]:
    """Each row's messages and tools; where the answer is in a column of its own, it alone is learned.

    Args:
        rows: the rows.
        data: their columns.
        where: name of the rows in errors.
        labelled: whether that column is there, and read.
    """
    needs_column(rows, str(data.text), where)
    seconds, systems, tools = (
        rows[name] if name in rows.column_names else [None] * len(rows)
        for name in (data.text_pair, data.system, data.tools)
    )

    def said(row: tuple[Any, Any, Any, Any]) -> tuple[list[Message], Tools]:
        text, second, system, own = row
        with of_column(str(data.text)):
            if data.label is None and labelled:
                messages = as_messages(text, system)
            else:  # a prompt to answer may be a text
                both = isinstance(text, str) and isinstance(second, str) and second.strip()
                messages = _lifted(f"{text}\n{second}" if both else text, "user", system)
        with of_column(str(data.tools)):
            return messages, as_tools(own)

    found = read_each(zip(rows[str(data.text)], seconds, systems, tools, strict=True), said, where)
    if data.label is None or not labelled:
        return found
    needs_column(rows, data.label, where)

    def answer(value: Any) -> list[Message]:
        with of_column(str(data.label)):
            return _lifted(value, ASSISTANT)

    answers = read_each(rows[data.label], answer, where)
    return [
        ([*({**message, LEARNED: 0} for message in messages), *answer], own)
        for (messages, own), answer in zip(found, answers, strict=True)
    ]


def _lifted(value: Any, role: str, system: Any = None) -> list[Message]:
    """Messages; a text is a message of this role."""
    plain = isinstance(value, str) and not isinstance(parsed_cell(value), list)
    return as_messages([{"role": role, "content": value}] if plain else value, system)


def how_masked(tokenizer: PreTrainedTokenizerBase) -> str:
    """The way in which a conversation's targets are told from the rest, in words."""
    if _has_own_mask(tokenizer):
        return "the chat template's own mask says which tokens are learned"
    return "which tokens are learned is found by comparing layouts of the chat template"


def conversation_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools = None
) -> list[Piece]:
    """Lay out a conversation by the tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: dictionaries of ``role`` and ``content``, in order, as `as_messages` makes them. Those after
            the last one that is learned are left out.
        tools: those that the assistant may call.

    Returns:
        Stretches of tokens in order, each with whether the assistant says them, and they are learned.

    Raises:
        ConfigError: the tokenizer has no chat template.
        Unusable: nobody answers as the assistant, the template refuses the messages, or shows an answer
            nowhere.
    """
    _check_template(tokenizer)
    last = max((place for place, message in enumerate(messages) if learned(message)), default=None)
    if last is None:
        raise Unusable("has no message of the role 'assistant', so there is nothing to learn")
    messages = messages[: last + 1]
    said = [{key: value for key, value in message.items() if key != LEARNED} for message in messages]
    if _has_own_mask(tokenizer) and (pieces := _by_own_mask(tokenizer, messages, said, tools)) is not None:
        return pieces
    text, spans = _grown(tokenizer, said, tools) or _probed(tokenizer, said, tools)
    answers = [message for message in messages if message["role"] == ASSISTANT]
    kept = [span for span, message in zip(spans, answers, strict=True) if learned(message)]
    return pieces_of(tokenizer, text, kept)


def conversation_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools = None
) -> list[int]:
    """Lay out a conversation up to where the assistant speaks next.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: dictionaries of ``role`` and ``content``, in order, as `as_messages` makes them; an
            assistant's answer at the end is left out.
        tools: those that the assistant may call.

    Raises:
        ConfigError: the tokenizer has no chat template.
        Unusable: there is nothing before the answer.
    """
    _check_template(tokenizer)
    said = messages[:-1] if messages[-1]["role"] == ASSISTANT else messages
    if not said:
        raise Unusable("has nothing that the assistant could answer")
    text = _laid_out(tokenizer, said, tools, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def pieces_of(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    """The tokens of a text, and whether they are targets: those that end within one of some spans.

    Args:
        tokenizer: any; one that cannot say where its tokens stand reads each stretch by itself.
        text: the text to tokenize, without special tokens of its own accord.
        spans: first letter of each stretch that is learned, and the one after its last; in order, apart.
    """
    if not tokenizer.is_fast:
        ends = [0, *itertools.chain.from_iterable(spans), len(text)]
        parts = [(text[a:b], place % 2 == 1) for place, (a, b) in enumerate(itertools.pairwise(ends))]
        found = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part, _ in parts)
        return [(list(ids), target) for ids, (_, target) in zip(found, parts, strict=True) if ids]
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    mask, place = [], 0
    for end in ends:
        while place < len(spans) and end > spans[place][1]:
            place += 1
        mask.append(place < len(spans) and spans[place][0] < end)
    return _runs(encoded["input_ids"], mask)


def _runs(ids: Sequence[int], mask: Sequence[Any]) -> list[Piece]:
    pairs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1]))
    return [([token for token, _ in run], target) for target, run in pairs]


def _has_own_mask(tokenizer: PreTrainedTokenizerBase) -> bool:
    template = tokenizer.chat_template
    own = isinstance(template, str) and _OWN_MASK.search(template) is not None
    return own and bool(tokenizer.is_fast)


def _by_own_mask(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], said: list[Message], tools: Tools
) -> list[Piece] | None:
    """By the template's mask; None where it cannot be told which part of it is which message's."""
    try:
        found: Any = tokenizer.apply_chat_template(
            said, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise Unusable(f"is refused by the chat template: {error}") from error
    pieces = _runs(found["input_ids"], found["assistant_masks"])
    if not any(target for _, target in pieces):
        raise Unusable("has nothing that the chat template's own mask calls the assistant's")
    answers = [message for message in messages if message["role"] == ASSISTANT]
    if all(map(learned, answers)):
        return pieces
    if sum(target for _, target in pieces) != len(answers):
        return None
    wanted = iter(map(learned, answers))
    return [(ids, target and next(wanted)) for ids, target in pieces]


def _grown(
    tokenizer: PreTrainedTokenizerBase, said: list[Message], tools: Tools
) -> tuple[str, list[tuple[int, int]]] | None:
    """The layout, and where each answer stands: what is added with it. None where earlier turns change."""
    done, spans = "", []
    for i, message in enumerate(said):
        if message["role"] != ASSISTANT:
            continue
        # No template lays out a conversation of nothing.
        before = _laid_out(tokenizer, said[:i], tools, add_generation_prompt=True) if i else ""
        after = _laid_out(tokenizer, said[: i + 1], tools)
        if not (before.startswith(done) and after.startswith(before)):
            return None
        spans.append((len(before), len(after)))
        done = after
    return done, spans


def _probed(
    tokenizer: PreTrainedTokenizerBase, said: list[Message], tools: Tools
) -> tuple[str, list[tuple[int, int]]]:
    """The layout, and where each answer stands: where another in its place makes the layout another.

    Raises:
        Unusable: an answer is shown nowhere.
    """
    text = _laid_out(tokenizer, said, tools)
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(said):
        if message["role"] != ASSISTANT:
            continue
        probe = {"role": ASSISTANT, "content": _MARK}
        other = _laid_out(tokenizer, [*said[:i], probe, *said[i + 1 :]], tools)
        ended = _laid_out(tokenizer, [*said[:i], probe], tools).partition(_MARK)[2]
        start = alike(text, other)
        end = len(text) - alike(text[start:][::-1], other[start:][::-1])
        end += alike(text[end:], ended)
        before = spans[-1][1] if spans else 0
        if _MARK not in other or start < before:
            raise Unusable(
                f"has an answer in message {i + 1} that the chat template of {tokenizer.name_or_path!r} "
                "shows nowhere, so which tokens are the assistant's cannot be told; give one answer a row, "
                "as prompt and completion"
            )
        # What the template itself adds to an answer, such as the mark of no reasoning, is to be written too.
        opening = _opening(tokenizer, said[:i], tools) if i else ""
        place = text.rfind(opening, before, start) if opening else -1
        spans.append((place + len(opening) if place >= 0 else start, end))
    return text, spans


def _opening(tokenizer: PreTrainedTokenizerBase, said: list[Message], tools: Tools) -> str:
    """The text that a template puts before an answer."""
    closed, opened = (_laid_out(tokenizer, said, tools, add_generation_prompt=more) for more in (False, True))
    return opened[len(closed) :] if opened.startswith(closed) else ""


def _laid_out(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools, **options: Any
) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options))
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise Unusable(f"is refused by the chat template: {error}") from error


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template to lay out messages; take an "
            "instruction-tuned model's, set its chat_template, or give prompts and completions instead"
        )
