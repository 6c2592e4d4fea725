"""A decoder engine that writes a canned text for each adapter, a tokenizer of bytes, and requests."""

from __future__ import annotations

import asyncio
import json
import math
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lorica.serve.engine import (
    EngineDown,
    Entry,
    InvalidRequest,
    Limits,
    Overloaded,
    RefusedAdapter,
    Sampling,
    Stats,
    Step,
    Token,
    UnknownAdapter,
)

TEXTS = {
    None: " says the base. It is ☂ raining.",
    "blue": " says blue: sky and sea.",
    "red": " says red: fire!",
}
END = 0

_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> Any:
    """A token for each byte, and one for the end."""
    names = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(BPE({name: i for i, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", clean_up_tokenization_spaces=False
    )
    found.chat_template = _TEMPLATE
    return found


class Store:
    """Adapters that are names alone."""

    def __init__(self) -> None:
        self.known = {
            name: Entry(name=name, state="resident", rank=4, hash=name * 8) for name in ("blue", "red")
        }

    def entries(self) -> list[Entry]:
        return list(self.known.values())

    def entry(self, name: str) -> Entry:
        if name not in self.known:
            raise UnknownAdapter(f"no adapter is named {name!r}")
        return self.known[name]

    async def load(
        self, name: str, path: str | Path | None = None, *, pin: bool = False, replace: bool = False
    ) -> Entry:
        if name in self.known and not replace:
            raise RefusedAdapter(f"{name!r} is served already")
        if not str(path).startswith("good"):
            raise UnknownAdapter(f"there is no folder {path!r}")
        self.known[name] = Entry(name=name, state="resident", path=Path(str(path)), pinned=pin)
        return self.known[name]

    async def unload(self, name: str) -> None:
        self.entry(name)
        del self.known[name]


class Written:
    """One answer, token by token."""

    def __init__(self, engine: StandIn, ids: list[int], prompt: Sequence[int], sampling: Sampling) -> None:
        self.engine, self.sampling, self.open = engine, sampling, True
        self._steps = self._run(ids, prompt)
        engine.running.add(self)

    def __aiter__(self) -> AsyncIterator[Step]:
        return self._steps

    async def __anext__(self) -> Step:
        return await anext(self._steps)

    async def aclose(self) -> None:
        await self._steps.aclose()  # type: ignore[attr-defined]
        self.engine.running.discard(self)

    def _token(self, token: int, asked: int | None, at: int) -> Token:
        if asked is None:
            return Token(token)
        top = tuple((token + i, -0.1 - i) for i in range(asked))
        return Token(token, -0.1 if at else -math.inf, top)

    async def _run(self, ids: list[int], prompt: Sequence[int]) -> AsyncIterator[Step]:
        s, words = self.sampling, self.engine.tokenizer
        read = tuple(
            Token(token) if i == 0 else self._token(token, s.prompt_logprobs, i)
            for i, token in enumerate(prompt)
        )
        read = read if s.prompt_logprobs is not None else ()
        said, held, text = 0, [], ""
        try:
            if not s.max_tokens:
                yield Step("", (), "length", read)
                return
            for i, token in enumerate(ids):
                await asyncio.sleep(self.engine.pause)
                if self.engine.fails_after is not None and i >= self.engine.fails_after:
                    raise EngineDown("the engine died")
                held.append(token)
                text = words.decode(held, skip_special_tokens=True)
                ends = [at for stop in s.stop if (at := text.find(stop)) >= 0]
                finish = "stop" if token == END or ends else "length" if i + 1 == s.max_tokens else None
                whole = text[: min(ends)] if ends else text
                begun = any(whole.endswith(stop[:i]) for stop in s.stop for i in range(1, len(stop)))
                new = "" if (begun or whole.endswith("�")) and not finish else whole[said:]
                said += len(new)
                yield Step(new, (self._token(token, s.logprobs, i),), finish, read)  # type: ignore[arg-type]
                read = ()
                if finish:
                    return
        finally:
            self.engine.running.discard(self)


class StandIn:
    """An engine without a model."""

    def __init__(self) -> None:
        self.tokenizer, self.adapters, self.alive = tokenizer(), Store(), False
        self.limits = Limits(context=200, vocabulary=257, queue=8)
        self.stats = Stats(slots=4)
        self.running: set[Written] = set()
        self.pause, self.full = 0.0, False
        self.fails_after: int | None = None
        self.tenants: list[str] = []
        self.sampled: list[Sampling] = []
        self.prompts: list[list[int]] = []

    def admit(
        self, prompt: Sequence[int], adapter: str | None, sampling: Sampling, *, tenant: str = ""
    ) -> Written:
        if not self.alive:
            raise EngineDown("the engine does not run")
        if adapter is not None:
            self.adapters.entry(adapter)
        if self.full:
            raise Overloaded("8 requests wait, and 8 may", retry_after=2.5)
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if max(prompt) >= 257:
            raise InvalidRequest(f"there is no token {max(prompt)}", param="prompt")
        if len(prompt) + sampling.max_tokens > 200:
            raise InvalidRequest(
                f"{len(prompt)} + {sampling.max_tokens} tokens, where 200 fit", param="prompt"
            )
        if len(sampling.stop) > self.limits.stops:
            raise InvalidRequest(f"{len(sampling.stop)} stop texts, where 16 may be", param="stop")
        self.tenants.append(tenant)
        self.sampled.append(sampling)
        self.prompts.append(list(prompt))
        ids = [*self.tokenizer(TEXTS[adapter])["input_ids"], END]
        return Written(self, ids, prompt, sampling)

    async def start(self) -> None:
        self.alive = True

    async def stop(self, *, drain: float | None = None) -> None:
        self.alive = False


def call(url: str, body: Any = None, key: str | None = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and body of an answer; JSON where it is some."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request) as answer:
            status, told, text = answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, told, text = error.code, error.headers, error.read()
    return status, told, json.loads(text) if "json" in told.get("Content-Type", "") else text
