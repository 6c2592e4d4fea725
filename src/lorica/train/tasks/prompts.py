"""What a prompt is made of: the columns of known forms of rows, and the messages of a conversation.

Alpaca    system, instruction, input → output        prompt = the parts that are filled, a line break between
Dolly     instruction, context → response
OpenOrca  system_prompt, question → response
OpenAI    {"role": "user" | "assistant" | "system" ..., "content": text or parts of it}
ShareGPT  {"from": "human" | "gpt" | "system", "value": text}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset, List
from transformers import PreTrainedTokenizerBase

from lorica.errors import ConfigError, listing
from lorica.train.data.columns import by_lower_case, is_text, needs_column, text_of
from lorica.train.data.rows import RowError, Unusable, parsed_cell, read_each
from lorica.train.settings import DataConfig

FORMS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("prompt", "response"),
    ("context", "completion"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "response"),
    ("question", "answer"),
    ("question", "answers"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
)
"""Columns of a prompt and of what follows it; the first pair found wins."""

SECOND = ("input", "context", "passage")
"""Columns of a second part of the prompt, beside ``instruction`` or ``question``."""

SYSTEMS = ("system", "system_prompt")

CHATS = ("messages", "conversations", "conversation")

_RAW = ("text", "content", "document", "body", "article")
"""Columns of raw text, whatever texts stand beside them."""


def find_prompt(
    rows: Dataset, data: DataConfig, forms: Sequence[tuple[str, str]] = FORMS
) -> DataConfig | None:
    """The configuration with the columns of a known form, or None where rows have none of them.

    Raises:
        ConfigError: the rows are of a form that another task, or another library, learns from.
    """
    columns = by_lower_case(rows)
    _refuse_others(rows, columns)
    for prompt, completion in forms:
        if prompt in columns and completion in columns:
            found = replace(data, text=columns[prompt], label=columns[completion])
            kind = rows.features[columns[completion]]
            if isinstance(kind, List) and data.references not in columns:
                found = replace(found, references=columns[completion])
            return add_parts(rows, found)
    return None


def add_parts(rows: Dataset, data: DataConfig) -> DataConfig:
    """The configuration with the other columns of a prompt, where rows have them and it names none."""
    columns = by_lower_case(rows)
    if data.system is None:
        data = replace(data, system=next((columns[name] for name in SYSTEMS if name in columns), None))
    taken = {data.text, data.label}
    if data.text_pair is None and str(data.text).lower() in ("instruction", "question"):
        second = next(
            (columns[name] for name in SECOND if name in columns and columns[name] not in taken), None
        )
        data = replace(data, text_pair=second)
    return data


def check_raw(rows: Dataset, column: str) -> None:
    """Refuse to take a column for raw text, unasked, where others hold texts too and its name is not usual.

    Raises:
        ConfigError: it is such.
    """
    others = [name for name in rows.column_names if name != column and is_text(rows, name)]
    if others and column.lower() not in _RAW:
        raise ConfigError(
            f"cannot tell what is learned: texts stand in the columns {listing([column, *others])}. Raw "
            "text is "
            f"--data.text COLUMN; a prompt and what follows it --data.text COLUMN --data.label COLUMN"
        )


def prompt_columns(data: DataConfig) -> list[str]:
    """Columns that a prompt is made of, in their order."""
    return [name for name in (data.system, data.text, data.text_pair) if name is not None]


def prompts_of(rows: Dataset, data: DataConfig, where: str, *, filled: bool = False) -> list[str]:
    """The prompt of each row: its parts, without those that are empty, with a line break between.

    Args:
        rows: the rows; those of plain texts have the column `data.text` alone.
        data: the columns.
        where: what to call the rows in an error.
        filled: refuse empty prompts, and rows that lack a column.

    Raises:
        ConfigError: a column is missing.
        RowError: rows have no text, or an empty one.
    """
    assert data.text is not None
    columns = prompt_columns(data)
    for name in columns if filled else [data.text]:
        needs_column(rows, name, where)
    columns = [name for name in columns if name in rows.column_names]
    if columns == [data.text]:
        texts = read_each(rows[data.text], lambda value: text_of(value, str(data.text)), where)
    else:

        def joined(values: tuple[object, ...]) -> str:
            parts = [
                text_of(value, name)
                for name, value in zip(columns, values, strict=True)
                if value is not None or name == data.text
            ]
            return "\n".join(part for part in parts if part.strip())

        texts = read_each(zip(*(rows[name] for name in columns), strict=True), joined, where)
    blank = [row for row, text in enumerate(texts) if not text.strip()] if filled else []
    if blank:
        raise RowError(blank, where, f"has an empty text in column {data.text!r}")
    return texts


def filled_text(value: object, column: str) -> str:
    """A text that is to be written.

    Raises:
        Unusable: it is none, or empty.
    """
    if not text_of(value, column).strip():
        raise Unusable(f"has nothing to learn: the text in column {column!r} is empty")
    return str(value)


def _refuse_others(rows: Dataset, columns: dict[str, str]) -> None:
    if "chosen" in columns and "rejected" in columns:
        raise ConfigError(
            "these rows are preference pairs (chosen, rejected), which TRL's DPOTrainer learns from; it "
            "takes a model "
            "adapted by lorica. To learn the chosen answers alone: --data.text prompt --data.label "
            "chosen, or "
            "--data.text chosen where they are conversations"
        )
    answers = columns.get("answers")
    if {"question", "context"} <= set(columns) and answers and "answer_start" in str(rows.features[answers]):
        raise ConfigError("these rows are SQuAD's (question, context, answers): --task question-answering")
    history = columns.get("history")
    if history and "instruction" in columns and any(rows[history]):
        raise ConfigError(
            f"column {history!r} holds earlier turns; give each conversation as one row, of a list of "
            "messages with "
            "role and content"
        )


ASSISTANT = "assistant"

LEARNED = "weight"
"""Key of an assistant's message that says whether it is learned: 1 or 0, as in OpenAI's files."""

_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "bard", "bing"), ASSISTANT),
    "system": "system",
}

_CALLS = ("tool_calls", "function_call", "tool_call_id")


def as_messages(value: Any, system: Any = None) -> list[dict[str, Any]]:
    """A conversation's messages, each of ``role``, ``content`` and what else its template may read.

    Args:
        value: the messages in either form; a list, or JSON in a text.
        system: what the system says before them, where a column of its own holds that.

    Raises:
        Unusable: there are none, one is of neither form, or one is empty.
    """
    value = parsed_cell(value)
    if not isinstance(value, list) or not value:
        raise Unusable("has no messages; expected a list of dictionaries of role and content")
    messages = [_message(place, message) for place, message in enumerate(value, 1)]
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def learned(message: dict[str, Any]) -> bool:
    """Whether a message is the assistant's and is learned."""
    return message["role"] == ASSISTANT and message.get(LEARNED, 1) != 0


def _message(place: int, message: Any) -> dict[str, Any]:
    # A table gives all messages the same keys, with nothing under those that they lack.
    given = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    if called := next((key for key in _CALLS if given.get(key)), None):
        raise Unusable(f"has {called!r} in message {place}; calls of tools are not learned")
    if "from" in given and "role" not in given:
        speaker = given.pop("from")
        role = _SPEAKERS.get(str(speaker).lower())
        if role is None:
            raise Unusable(
                f"has a message {place} from {speaker!r}; known are {', '.join(sorted(_SPEAKERS))}"
            )
        given = {"role": role, "content": given.pop("value", None), **given}
    content = given.get("content")
    if isinstance(content, list):
        content = given["content"] = _joined(place, content)
    if not isinstance(given.get("role"), str) or not isinstance(content, str):
        raise Unusable(
            f"has message {place}, which must have a role and a content, both texts: {message!r:.60}"
        )
    if not content.strip() and given["role"] != "system":
        nothing = "has nothing to learn: the " if given["role"] == ASSISTANT else "has an empty text: the "
        raise Unusable(f"{nothing}{given['role']}'s message {place} is empty")
    if given.get(LEARNED, 1) not in (0, 1):
        raise Unusable(f"has the weight {given[LEARNED]!r} in message {place}, which must be 0 or 1")
    return given


def _joined(place: int, parts: list[Any]) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise Unusable(f"has a part {kind!r:.40} in message {place}; texts alone are learned")
    return "".join(part["text"] for part in parts)


def conversation_pieces(tokenizer: PreTrainedTokenizerBase, messages: Any) -> list[tuple[list[int], bool]]:
    """Lay out a conversation by the tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: dictionaries of ``role`` and ``content``, in order, as `as_messages` makes them.

    Returns:
        Stretches of tokens in order, each with whether the assistant says them, and they are learned.

    Raises:
        ConfigError: the tokenizer has no chat template.
        Unusable: nobody answers as the assistant, or the template refuses them or
            rewrites earlier turns of theirs.
    """
    _check_template(tokenizer)
    if not any(map(learned, messages)):
        raise Unusable("has no message of the role 'assistant', so there is nothing to learn")
    pieces: list[tuple[str, bool]] = []
    done = ""
    said = [{key: value for key, value in message.items() if key != LEARNED} for message in messages]
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        # No template lays out a conversation of nothing.
        before = _laid_out(tokenizer, said[:i], add_generation_prompt=True) if i else ""
        after = _laid_out(tokenizer, said[: i + 1])
        if not (before.startswith(done) and after.startswith(before)):
            raise Unusable(
                f"is laid out otherwise with each message: the chat template of {tokenizer.name_or_path!r} "
                "changes earlier turns when one is added, so which tokens are the assistant's cannot be "
                "told; give one answer a row, as prompt and completion"
            )
        pieces += [(before[len(done) :], False), (after[len(before) :], learned(message))]
        done = after
    return [
        (list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), target)
        for text, target in pieces
    ]


def conversation_prompt(tokenizer: PreTrainedTokenizerBase, messages: Any) -> list[int]:
    """Lay out a conversation up to where the assistant speaks next.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: dictionaries of ``role`` and ``content``, in order, as `as_messages` makes them; an
            assistant's answer at the end is left out.

    Raises:
        ConfigError: the tokenizer has no chat template.
        Unusable: there is nothing before the answer.
    """
    _check_template(tokenizer)
    said = messages[:-1] if messages[-1]["role"] == ASSISTANT else messages
    if not said:
        raise Unusable("has nothing that the assistant could answer")
    text = _laid_out(tokenizer, said, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _laid_out(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise Unusable(f"is refused by the chat template: {error}") from error


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template to lay out messages; take an "
            "instruction-tuned model's, set its chat_template, or give prompts and completions instead"
        )
