"""Conversations as rows have them, in the two forms that are in use, as one list of messages.

OpenAI    {"role": "user" | "assistant" | "system" ..., "content": text or parts of it}
ShareGPT  {"from": "human" | "gpt" | "system", "value": text}
"""

from __future__ import annotations

from typing import Any

from lorica.train.cells import structured
from lorica.train.rows import Unusable

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
    value = structured(value)
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
