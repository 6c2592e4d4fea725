"""Text from tokens as they come: no half characters, and nothing that may be the start of a stop text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_BROKEN = "�"
"""The character that a tokenizer writes for bytes that are no character, or not yet."""
_LONGEST = 8
"""Tokens that a character can be cut into; where more stay broken, they never were one."""


class Writer:
    """Writes one answer.

    Args:
        tokenizer: of transformers, or anything with its `decode`; None writes nothing.
        stop: texts that end the answer, and are no part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._start = 0  # from here on tokens are decoded, with some before for the spaces between words
        self._written = 0  # up to here they were
        self._held = ""
        self.stopped = False

    def write(self, ids: Iterable[int]) -> str:
        """Take tokens one by one, and return the text that is sure; `stopped` says whether it is the end.

        Tokens after the one that completes a stop text are not taken.
        """
        return "".join(self._one(id) for id in ids if not self.stopped)

    def finish(self) -> str:
        """The answer ended otherwise: the text that was held back."""
        if self._tokenizer is None or self.stopped:
            return ""
        rest = self._held + self._decoded(self._ids[self._start :], self._ids[self._start : self._written])
        self._held, self._written = "", len(self._ids)
        return self._cut(rest, last=True)

    def _one(self, id: int) -> str:
        if self._tokenizer is None:
            return ""
        self._ids.append(id)
        fresh = self._decoded(self._ids[self._start :], self._ids[self._start : self._written])
        broken = fresh.endswith(_BROKEN) and len(self._ids) - self._written < _LONGEST
        if broken or not fresh:
            return ""
        self._start, self._written = self._written, len(self._ids)
        return self._cut(self._held + fresh, last=False)

    def _decoded(self, ids: list[int], before: list[int]) -> str:
        whole = self._tokenizer.decode(ids, skip_special_tokens=True)
        return whole[len(self._tokenizer.decode(before, skip_special_tokens=True)) :]

    def _cut(self, text: str, *, last: bool) -> str:
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of a text that begin a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
