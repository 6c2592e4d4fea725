"""A conversation with a model and its adapters, beside no server: the engine is asked in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorica.errors import ConfigError, nearest
from lorica.serve.decoder import Decoder
from lorica.serve.engine import Sampling
from lorica.serve.http.text import Texts

BASE = "base"
"""The base's name in places where an adapter's is due."""

HELP = """\
/adapter NAME          answer with another adapter ("base" for none)
/compare NAME NAME     let two answer each message; /compare alone ends that
/adapters              list the adapters
/reset                 forget the conversation
/quit                  leave"""


@dataclass(eq=False)
class Conversation:
    """The conversation, and the adapters that answer.

    Args:
        engine: that answers; it runs.
        sampling: how.
        names: the adapters that answer, one or two; None is the base.
        messages: the conversation.
    """

    engine: Decoder
    sampling: Sampling
    names: tuple[str | None, ...] = (None,)
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the tokenizer ready."""
        self.texts = Texts(self.engine.tokenizer)
        self.chats = bool(getattr(self.engine.tokenizer, "chat_template", None))

    def known(self, name: str) -> str | None:
        """An adapter by its name, or the base.

        Raises:
            ConfigError: there is none of that name.
        """
        names = [entry.name for entry in self.engine.adapters.entries()]
        if name in names:
            return name
        if name == BASE:
            return None
        raise ConfigError(f"there is no adapter {name!r}{nearest(name, [BASE, *names])}")

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with ``/``.

        Returns:
            The reply; None ends the conversation.

        Raises:
            ConfigError: there is no such command or adapter.
        """
        word, *given = line.split()
        if word in ("/quit", "/exit") and not given:
            return None
        if word == "/help":
            return HELP
        if word == "/reset" and not given:
            self.messages.clear()
            return "the conversation begins anew"
        if word == "/adapters" and not given:
            return "\n".join([BASE, *(f"{e.name}  {e.state}" for e in self.engine.adapters.entries())])
        if word == "/adapter" and len(given) == 1:
            self.names = (self.known(given[0]),)
            return f"{given[0]} answers"
        if word == "/compare" and len(given) in (0, 2):
            self.names = tuple(map(self.known, given)) or self.names[:1]
            return f"{' and '.join(name or BASE for name in self.names)} {'answer' if given else 'answers'}"
        raise ConfigError(f"{line!r} is no command:\n{HELP}")

    async def ask(self, text: str, show: Callable[[int, str], object]) -> list[str]:
        """Say something, and let each adapter answer; the conversation goes on from the first one's answer.

        Args:
            text: the message.
            show: told of each piece of text as it comes, and whose it is, by its place among `names`.

        Returns:
            The answers.

        Raises:
            LoricaError: the engine refuses, or fails.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        answers = await asyncio.gather(
            *(self._answer(said, name, lambda t, i=i: show(i, t)) for i, name in enumerate(self.names))
        )
        if self.chats:
            self.messages = [*said, {"role": "assistant", "content": answers[0]}]
        return list(answers)

    async def _laid_out(self, said: Sequence[Mapping[str, str]], name: str | None) -> list[int]:
        """The token ids of what was said, by the adapter's own chat template where it brings one."""
        template = None if name is None else self.engine.adapters.entry(name).template
        if self.chats or template is not None:
            return await self.texts.chat(said, template=template)
        return (await self.texts.encode([said[-1]["content"]]))[0]

    async def _answer(
        self, said: Sequence[Mapping[str, str]], name: str | None, show: Callable[[str], object]
    ) -> str:
        ids = await self._laid_out(said, name)
        room = self.engine.limits.context - len(ids)
        sampling = replace(self.sampling, max_tokens=max(1, min(self.sampling.max_tokens, room)))
        answer = self.engine.admit(ids, name, sampling)
        texts: list[str] = []
        try:
            async for step in answer:
                texts.append(step.text)
                show(step.text)
        finally:
            await answer.aclose()
        return "".join(texts)
