"""Rows that say which answer is better: pairs of answers to a prompt, and answers that were judged alone.

pairs     prompt, chosen, rejected      texts or messages; both answers may begin with the prompt
          chosen, rejected              the prompt is the beginning that both share
          input, preferred_output, non_preferred_output       OpenAI's
judged    prompt, completion, label     true or false; or messages and a label, on the last answer

A prompt and an answer are both texts, or both lists of messages: then an answer in text becomes what the
assistant says, and a prompt in text what the user says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from datasets import Dataset

from lorica.errors import ConfigError, listing
from lorica.train.data.columns import by_lower_case, needs_column
from lorica.train.data.forms.known import CHATS, SECOND, SYSTEMS, TOOLS, holds_messages
from lorica.train.data.forms.messages import (
    ASSISTANT,
    Message,
    Tools,
    alike,
    as_messages,
    as_tools,
    is_messages,
)
from lorica.train.data.rows import Unusable, of_column, parsed_cell, read_each
from lorica.train.settings import DataConfig

Said = str | list[Message]
"""A prompt or an answer: a text, or messages."""


class Pair(NamedTuple):
    """Two answers to a prompt, all three of one kind. A prompt of nothing is ``""``, or no messages.

    Args:
        prompt: the prompt that both answer.
        chosen: the better answer.
        rejected: the other one.
        tools: those that messages may call, for the chat template; or None.
    """

    prompt: Said
    chosen: Said
    rejected: Said
    tools: Tools = None


class Judged(NamedTuple):
    """An answer to a prompt, and whether it is wanted.

    Args:
        prompt: the prompt that it answers.
        answer: the answer, of the same kind.
        wanted: whether it is a good one.
        tools: those that messages may call, for the chat template; or None.
    """

    prompt: Said
    answer: Said
    wanted: bool
    tools: Tools = None


class Asked(NamedTuple):
    """A prompt alone.

    Args:
        prompt: a text, or messages the last of which is not the assistant's.
        tools: those that messages may call, for the chat template; or None.
    """

    prompt: Said
    tools: Tools = None


_PROMPTS = ("prompt", "question", "instruction", "query", *CHATS, "input", "context")
_CHOSEN = ("chosen", "preferred", "preferred_output", "chosen_response", "accepted")
_REJECTED = ("rejected", "dispreferred", "non_preferred_output", "rejected_response")
_ANSWERS = ("completion", "response", "answer", "output")
_VERDICTS = ("label", "verdict", "wanted", "desirable", "kto_tag", "liked")

_WANTED = {
    **dict.fromkeys(("true", "1", "yes", "good", "desirable", "wanted", "chosen"), True),
    **dict.fromkeys(("false", "0", "-1", "no", "bad", "undesirable", "unwanted", "rejected"), False),
}


def find_pairs(rows: Dataset, data: DataConfig) -> DataConfig:
    """The configuration with the columns of pairs: ``chosen``, ``rejected``, and ``text`` of the prompt.

    ``text`` stays None where there is no prompt beside the two. Columns that are named already are checked.

    Raises:
        ConfigError: a named column does not exist, or there are no two answers.
    """
    columns = _checked(rows, data)
    chosen = data.chosen or _first(columns, _CHOSEN)
    rejected = data.rejected or _first(columns, _REJECTED)
    if chosen is None or rejected is None:
        raise ConfigError(
            "cannot tell which columns hold the better and the worse answer; name them with --data.chosen "
            f"and --data.rejected. The columns are: {listing(rows.column_names)}"
        )
    return _with_prompt(columns, replace(data, chosen=chosen, rejected=rejected))


def find_judged(rows: Dataset, data: DataConfig) -> DataConfig:
    """The configuration with the columns of judged answers: ``label`` (the answer), ``verdict``, ``text``.

    ``label`` stays None where ``text`` holds conversations, whose last answer is judged.

    Raises:
        ConfigError: a named column does not exist, or the answer or its verdict is not to be found.
    """
    columns = _checked(rows, data)
    verdict = data.verdict or _first(columns, _VERDICTS)
    if verdict is None:
        raise ConfigError(
            "cannot tell which column says whether an answer is wanted; name it with --data.verdict. The "
            f"columns are: {listing(rows.column_names)}"
        )
    data = replace(data, verdict=verdict, label=data.label or _first(columns, _ANSWERS))
    data = _with_prompt(columns, data)
    if data.text is None or (data.label is None and not holds_messages(rows, data.text)):
        raise ConfigError(
            "cannot tell which columns hold the prompt and the answer that was judged; name them with "
            f"--data.text and --data.label. The columns are: {listing(rows.column_names)}"
        )
    return data


def find_asked(rows: Dataset, data: DataConfig) -> DataConfig:
    """The configuration with the columns of prompts alone: ``text``, and its parts.

    Raises:
        ConfigError: a named column does not exist, or none is known for a prompt.
    """
    data = _with_prompt(_checked(rows, data), data)
    if data.text is None:
        raise ConfigError(
            "cannot tell which column holds the prompt; name it with --data.text. The columns are: "
            f"{listing(rows.column_names)}"
        )
    return data


def pairs_of(rows: Dataset, data: DataConfig, where: str) -> list[Pair]:
    """The pair of each row.

    Args:
        rows: the rows.
        data: their columns, as `find_pairs` finds them.
        where: name of the rows in errors.

    Raises:
        ConfigError: a column is missing.
        RowError: rows lack an answer, or have the same one twice.
    """
    needed = (data.text, data.text_pair, data.system, data.tools, data.chosen, data.rejected)

    def read(row: Sequence[Any]) -> Pair:
        text, second, system, tools, *answers = row
        chosen, rejected = (
            _laid(_said(value, str(name)), ASSISTANT, data)
            for value, name in zip(answers, needed[-2:], strict=True)
        )
        prompt = None if data.text is None else _prompt(text, second, data)
        found = _apart(prompt, chosen, rejected)
        _check_answers(found.chosen, found.rejected)
        return found._replace(prompt=_after_system(found.prompt, system), tools=_tools(tools, data))

    return read_each(_cells(rows, needed, where), read, where)


def judged_of(rows: Dataset, data: DataConfig, where: str) -> list[Judged]:
    """The judged answer of each row; see `pairs_of`. The columns are those of `find_judged`."""
    needed = (data.text, data.text_pair, data.system, data.tools, data.label, data.verdict)

    def read(row: Sequence[Any]) -> Judged:
        text, second, system, tools, answer, verdict = row
        prompt = _prompt(text, second, data)
        if data.label is None:
            if isinstance(prompt, str) or prompt[-1]["role"] != ASSISTANT:
                raise Unusable("has a conversation that does not end with what the assistant says")
            prompt, said = prompt[:-1], prompt[-1:]
        else:
            prompt, said = as_one_kind(prompt, _said(answer, data.label), data)
        _check_answers(said)
        found = _after_system(prompt, system)
        return Judged(found, said, _verdict(verdict, str(data.verdict)), _tools(tools, data))

    return read_each(_cells(rows, needed, where), read, where)


def asked_of(rows: Dataset, data: DataConfig, where: str) -> list[Asked]:
    """The prompt of each row; see `pairs_of`. What the assistant says at a conversation's end is left out."""

    def read(row: Sequence[Any]) -> Asked:
        text, second, system, tools = row
        prompt = _laid(_prompt(text, second, data), "user", data)
        if not isinstance(prompt, str):
            prompt = prompt[:-1] if prompt[-1]["role"] == ASSISTANT else prompt
        if not prompt:
            raise Unusable(f"has nothing to answer in column {data.text!r}")
        return Asked(_after_system(prompt, system), _tools(tools, data))

    return read_each(_cells(rows, (data.text, data.text_pair, data.system, data.tools), where), read, where)


def answered_of(rows: Dataset, data: DataConfig, answer: str, where: str) -> list[tuple[Said, Said, Tools]]:
    """The prompt, the answer and the tools of each row to score.

    Args:
        rows: the rows; a conversation in one column holds prompt and answer.
        data: the columns of pairs, as `find_pairs` found them; rows need the prompt's alone.
        answer: column of the answer.
        where: name of the rows in errors.

    Raises:
        ConfigError: a column is missing.
        RowError: rows lack an answer.
    """
    whole = answer not in rows.column_names and holds_messages(rows, data.text)
    if data.text is not None:
        needs_column(rows, data.text, where)
    text = data.text or ("prompt" if data.messages and "prompt" in rows.column_names else None)
    parts = [
        name if name in rows.column_names else None for name in (data.text_pair, data.system, data.tools)
    ]

    def read(row: Sequence[Any]) -> tuple[Said, Said, Tools]:
        asked, second, system, tools, given = row
        said = _said(given, str(column))
        prompt = "" if text is None or whole else _prompt(asked, second, data)
        if not prompt and not isinstance(said, str):
            prompt, said = said[:-1], said[-1:]
        prompt, said = as_one_kind(prompt, said, data)
        _check_answers(said)
        return _after_system(prompt, system), said, _tools(tools, data)

    column = text if whole else answer
    return read_each(_cells(rows, (text, *parts, column), where), read, where)


def _checked(rows: Dataset, data: DataConfig) -> dict[str, str]:
    named = (data.text, data.text_pair, data.system, data.label, data.chosen, data.rejected, data.verdict)
    for name in (*named, data.tools):
        if name is not None:
            needs_column(rows, name, "the training rows")
    return by_lower_case(rows)


def _first(columns: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)


def _with_prompt(columns: Mapping[str, str], data: DataConfig) -> DataConfig:
    """The configuration with the columns of a prompt and its parts, where it names none."""
    taken = {data.chosen, data.rejected, data.label, data.verdict}
    free = {low: name for low, name in columns.items() if name not in taken}
    text = data.text or _first(free, _PROMPTS)
    second = data.text_pair
    if second is None and str(text).lower() in ("instruction", "question"):
        second = _first({low: name for low, name in free.items() if name != text}, SECOND)
    system = data.system or _first(free, SYSTEMS)
    return replace(data, text=text, text_pair=second, system=system, tools=data.tools or _first(free, TOOLS))


def _cells(rows: Dataset, columns: Sequence[str | None], where: str) -> Any:
    for name in columns:
        if name is not None:
            needs_column(rows, name, where)
    return zip(*(([None] * len(rows)) if name is None else rows[name] for name in columns), strict=True)


def _said(value: Any, column: str) -> Said:
    """The content of a cell: a text, or messages; OpenAI's requests hold these under a name."""
    parsed = parsed_cell(value)
    if isinstance(parsed, Mapping) and isinstance(parsed.get("messages"), list):
        parsed = parsed["messages"]
    if isinstance(parsed, Mapping) and is_messages(parsed):
        parsed = [parsed]
    if isinstance(parsed, list) and is_messages(parsed):
        with of_column(column):
            return as_messages(parsed)
    if isinstance(value, str):
        return value
    got = "nothing" if value is None else f"{value!r:.60}"
    raise Unusable(f"has {got} in column {column!r}, where a text or messages are due")


def _tools(value: Any, data: DataConfig) -> Tools:
    with of_column(str(data.tools)):
        return as_tools(value)


def _prompt(value: Any, second: Any, data: DataConfig) -> Said:
    prompt = _said(value, str(data.text))
    if isinstance(prompt, str) and isinstance(second, str) and second.strip():
        return f"{prompt}\n{second}"
    return prompt


def _after_system(prompt: Said, system: Any) -> Said:
    if not isinstance(system, str) or not system.strip():
        return prompt
    if isinstance(prompt, str):
        return f"{system}\n{prompt}"
    first = prompt and prompt[0]["role"] == "system"
    return prompt if first else [{"role": "system", "content": system}, *prompt]


def _laid(said: Said, role: str, data: DataConfig) -> Said:
    """A text, as messages where the rows are conversations."""
    return _as_list(said, role) if data.messages else said


def as_one_kind(prompt: Said, answer: Said, data: DataConfig) -> tuple[Said, Said]:
    """Prompt and answer of one kind: messages where either is, or where the rows are conversations."""
    if isinstance(prompt, str) and isinstance(answer, str) and not data.messages:
        return prompt, answer
    return _as_list(prompt, "user"), _as_list(answer, ASSISTANT)


def _as_list(said: Said | None, role: str) -> list[Message]:
    if isinstance(said, list):
        return said
    return [{"role": role, "content": said}] if said and said.strip() else []


def _apart(prompt: Said | None, chosen: Said, rejected: Said) -> Pair:
    """A pair with the prompt in its own place, and not at the start of the answers as well."""
    if chosen == rejected:
        raise Unusable("has the same answer twice, as the better and as the worse one")
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        if prompt is None or (prompt and chosen.startswith(prompt) and rejected.startswith(prompt)):
            prompt = _shared_text(chosen, rejected) if prompt is None else prompt
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return Pair(prompt, chosen, rejected)
    better, worse = _as_list(chosen, ASSISTANT), _as_list(rejected, ASSISTANT)
    asked = _as_list(prompt, "user")
    count = alike(better, worse)
    shared = better[:count]
    # A prompt in text beside whole conversations is their first question again.
    held = isinstance(prompt, str) and any(message["role"] == "user" for message in shared)
    held = held or shared[: len(asked)] == asked
    return Pair(shared if held else [*asked, *shared], better[count:], worse[count:])


def _shared_text(chosen: str, rejected: str) -> str:
    """The beginning that both share, up to the end of a word; a space after it stays with the answers."""
    shared = chosen[: alike(chosen, rejected)]
    end = max((place + 1 for place, letter in enumerate(shared) if letter.isspace()), default=0)
    return shared[:end].rstrip(" ")


def _check_answers(*answers: Said) -> None:
    for answer in answers:
        if not answer or (isinstance(answer, str) and not answer.strip()):
            raise Unusable("has an empty answer")
        if not isinstance(answer, str) and answer[-1]["role"] != ASSISTANT:
            raise Unusable("has an answer whose last message is not the assistant's")


def _verdict(value: Any, column: str) -> bool:
    plain = str(value).strip().lower()
    if plain.endswith(".0"):  # a number with a point, as tables write them
        plain = plain[:-2]
    if plain not in _WANTED:
        got = "nothing" if value is None else f"{value!r:.60}"
        raise Unusable(f"has {got} in column {column!r}, where true or false is due")
    return _WANTED[plain]
