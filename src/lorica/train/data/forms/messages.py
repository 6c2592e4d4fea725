"""The messages of a conversation, however they are spelled, as chat templates read them: role and content.

OpenAI    {"role": "user" | "assistant" | "system" | "tool" ..., "content": text or parts of it}
          {"role": "assistant", "tool_calls": [{"function": {"name": ..., "arguments": object or JSON}}]}
ShareGPT  {"from": "human" | "gpt" | "system" | "function_call" | "observation", "value": text}
others    {"speaker" | "role" | "from": ..., "text" | "value" | "content": text}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorica.train.data.rows import Unusable, parsed_cell

ASSISTANT = "assistant"

Tools = list[Any] | None
"""Those that a conversation may call, for the chat template: OpenAI's dictionaries."""

LEARNED = "weight"
"""Key of an assistant's message that says whether it is learned: 1 or 0, as in OpenAI's files."""

Message = dict[str, Any]
"""A message: ``role``, ``content``, and whatever else a template may read, such as ``tool_calls``."""

_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "bard", "bing"), ASSISTANT),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
    "system": "system",
    "function_call": "function_call",
}

_WHO, _WHAT = ("role", "from", "speaker"), ("content", "value", "text")


def alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of the first items that two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def is_messages(value: Any) -> bool:
    """Whether a cell holds a list of messages, or one, maybe as JSON."""
    value = parsed_cell(value)
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and any(name in first for name in _WHO)


def as_messages(value: Any, system: Any = None) -> list[Message]:
    """A conversation's messages, each of ``role``, ``content`` and other keys that its template may read.

    Args:
        value: the messages in any spelling; a list, or JSON in a text.
        system: the system's message before them, where a column of its own holds it.

    Raises:
        Unusable: there are none, one is of no known spelling, or one is empty.
    """
    value = parsed_cell(value)
    if not isinstance(value, list) or not value:
        raise Unusable("has no messages; expected a list of dictionaries of role and content")
    messages = [_message(place, message) for place, message in enumerate(value, 1)]
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def learned(message: Message) -> bool:
    """Whether a message is the assistant's and is learned."""
    return message["role"] == ASSISTANT and message.get(LEARNED, 1) != 0


def said_by(messages: list[Message]) -> str:
    """The last words of the assistant that are learned; calls of tools without a word, as JSON."""
    last = next(message for message in reversed(messages) if learned(message))
    return last["content"] or json.dumps(last.get("tool_calls"), ensure_ascii=False)


def as_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools that a conversation may call, as templates read them; None where there are none.

    Args:
        value: a list of OpenAI's ``{"type": "function", "function": ...}``, or of what stands under
            ``function``; or JSON of it.

    Raises:
        Unusable: it is something else.
    """
    value = parsed_cell(value)
    if value is None or value in ("", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise Unusable(f"has {value!r:.60} as its tools, where a list of dictionaries is due")
    tools = [_filled(tool) for tool in value]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _message(place: int, message: Any) -> Message:
    given = _spelled(place, message)
    _take_calls(place, given)
    calls = given.get("tool_calls")
    content = given.get("content")
    if isinstance(content, list) and (given.get("role") != "tool" or _is_parts(content)):
        content = _joined(place, content)
    elif given.get("role") == "tool" and content is not None and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    elif content is None and calls:
        content = ""
    if not isinstance(given.get("role"), str) or not isinstance(content, str):
        raise Unusable(
            f"has message {place}, which must have a role and a content, both texts: {message!r:.60}"
        )
    given["content"] = content
    if not content.strip() and not calls and given["role"] not in ("system", "tool"):
        nothing = "has nothing to learn: the " if given["role"] == ASSISTANT else "has an empty text: the "
        raise Unusable(f"{nothing}{given['role']}'s message {place} is empty")
    if given.get(LEARNED, 1) not in (0, 1):
        raise Unusable(f"has the weight {given[LEARNED]!r} in message {place}, which must be 0 or 1")
    return given


def _spelled(place: int, message: Any) -> Message:
    """A message with the keys that OpenAI's have."""
    # A table gives all messages the same keys, with nothing under those that they lack.
    given = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
    who = next((key for key in _WHO if key in given), None)
    if who is None:
        return given
    what = next((key for key in _WHAT if key in given), None)
    speaker = given.pop(who)
    role = _SPEAKERS.get(str(speaker).lower(), speaker if who == "role" else None)
    if role is None:
        raise Unusable(f"has a message {place} from {speaker!r}; known are {', '.join(sorted(_SPEAKERS))}")
    spelled = {"role": role, **({"content": given.pop(what)} if what is not None else {}), **given}
    if role == "function_call":  # ShareGPT's calls stand in the text
        calls = spelled.pop("content", None)
        spelled = {**spelled, "role": ASSISTANT, "tool_calls": calls}
    return spelled


def _take_calls(place: int, given: Message) -> None:
    """Bring calls of tools into the form that templates read: arguments as objects."""
    calls = given.get("tool_calls")
    if calls is None and "function_call" in given:  # OpenAI's, before there were several
        calls = given.pop("function_call")
    if calls is None:
        return
    calls = parsed_cell(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise Unusable(f"has {calls!r:.60} in message {place}, where calls of tools are due")
    given["tool_calls"] = [_call(place, _filled(call)) for call in calls]
    if not given["tool_calls"]:
        del given["tool_calls"]


def _call(place: int, call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable(f"has a call of a tool without a name in message {place}: {call!r:.60}")
    arguments = parsed_cell(function.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise Unusable(
            f"has {arguments!r:.60} as a call's arguments in message {place}, where an object is due"
        )
    function = {**function, "arguments": arguments}
    return (
        {**call, "function": function} if "function" in call else {"type": "function", "function": function}
    )


def _filled(value: Any) -> Any:
    """A value without its nulls: a table gives all objects of a column the same keys."""
    if isinstance(value, Mapping):
        return {name: _filled(item) for name, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _is_parts(content: list[Any]) -> bool:
    return bool(content) and all(isinstance(part, Mapping) and "type" in part for part in content)


def _joined(place: int, parts: list[Any]) -> str:
    for part in parts:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise Unusable(f"has a part {kind!r:.40} in message {place}; texts alone are learned")
    return "".join(part["text"] for part in parts)
