"""A base's tokenizer, as endpoints use it: in one thread of its own, away from the event loop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from lorica.serve.http.errors import refused

T = TypeVar("T")

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Texts:
    """Texts to token ids, and back.

    A fast tokenizer's settings are its own, not a call's, so that only one thread may use it; and a long text
    takes seconds, in which the event loop has other things to do.

    Args:
        tokenizer: transformers'.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Keep the tokenizer; the thread starts with the first call."""
        self.tokenizer = tokenizer
        self._thread: ThreadPoolExecutor | None = None
        self._bytes = _bytes_of_characters() if _is_byte_level(tokenizer) else {}
        self.piece = lru_cache(1 << 16)(self._piece)

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Do something with the tokenizer in its thread."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "lorica-tokenizer")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def close(self) -> None:
        """Let the thread end; the next call starts another."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    async def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """The token ids of texts.

        Args:
            texts: the texts.
            special: whether the model's own marks are put around each.
        """
        return await self.run(self._encode, list(texts), special)

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    async def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids."""
        return await self.run(lambda: self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        begin: bool = True,
        go_on: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation.

        Args:
            messages: `role`, `content` and other keys that the template reads.
            template: an adapter's own; None takes the tokenizer's.
            tools: that the template tells the model of.
            begin: whether the answer's beginning is laid out too.
            go_on: whether the last message is unfinished, and the answer goes on with it.
            settings: further values that the template reads.

        Raises:
            ApiError: there is no template, or it cannot lay these messages out.
        """
        if template is None and not getattr(self.tokenizer, "chat_template", None):
            raise refused(
                "this model's tokenizer has no chat template, so a conversation cannot be laid out; use "
                "/v1/completions",
                "messages",
            )
        if go_on and begin:
            raise refused(
                "continue_final_message goes on with the last message; set add_generation_prompt to false",
                "continue_final_message",
            )
        taken = {"tokenize", "return_dict", "chat_template", "tools", "add_generation_prompt"} & set(
            settings or {}
        )
        if taken:
            raise refused(
                f"chat_template_kwargs may not set {', '.join(sorted(taken))}", "chat_template_kwargs"
            )

        def lay_out() -> list[int]:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=template,
                add_generation_prompt=begin,
                continue_final_message=go_on,
                tokenize=False,
                **(settings or {}),
            )
            return self._encode([text], False)[0]  # the template writes the model's marks itself

        try:
            return await self.run(lay_out)
        except Exception as error:  # templates raise what they like, of what the client sent
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise refused(f"the chat template cannot lay these messages out: {reason}", "messages") from error

    def _piece(self, token: int) -> tuple[str, bytes]:
        """A token's text, and its bytes: of a part of a character the text is no whole one."""
        text = self.tokenizer.decode([token])
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None or token in self.tokenizer.all_special_ids:
            return text, text.encode("utf-8", "replace")
        if self._bytes:
            raw = bytes(self._bytes[character] for character in name if character in self._bytes)
            return raw.decode("utf-8", "replace"), raw
        if found := _BYTE.fullmatch(name):
            raw = bytes([int(found[1], 16)])
            return raw.decode("utf-8", "replace"), raw
        if name.startswith("▁"):  # decoding one token alone drops the space before its word
            text = name.replace("▁", " ")
        return text, text.encode("utf-8", "replace")


def _is_byte_level(tokenizer: Any) -> bool:
    core = getattr(tokenizer, "backend_tokenizer", None)
    return core is not None and "ByteLevel" in str(core.decoder)


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}
