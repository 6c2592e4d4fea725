"""A process of clients: each asks, leaves, errs and asks again until the time is over, and checks answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
from soak.world import FIXED, GUEST, SWAPPED, VISITOR

CLIENTS, PAUSE, PATIENCE = 6, 0.25, 120.0
"""Clients of a process; mean seconds between a client's requests; after so many an answer counts as lost."""
CLOSE = 1e-3
"""How far logarithms of probabilities may be from those of each adapter alone."""
ERROR = {"message", "type", "param", "code"}
MEANS = {
    "base": ("base",),
    **{f"a{i}": (f"c{i}",) for i in range(FIXED)},
    SWAPPED: ("c6", "c7"),
    VISITOR: ("c7", "c8"),
    GUEST: ("c8",),
}
"""What each name may stand for."""
_P = {"model": "base", "prompt": "w3"}
_C = {"model": "base", "messages": [{"role": "user", "content": "w3"}]}
BAD: tuple[tuple[str, Any, int], ...] = (
    ("/v1/completions", {**_P, "model": "nobody"}, 404),
    ("/v1/completions", {**_P, "model": "../../etc/passwd"}, 404),
    ("/v1/completions", {**_P, "prompt": ""}, 400),
    ("/v1/completions", {**_P, "prompt": []}, 400),
    ("/v1/completions", {**_P, "prompt": [5, 10**6]}, 400),
    ("/v1/completions", {**_P, "prompt": [-1]}, 400),
    ("/v1/completions", {**_P, "prompt": [3] * 3000}, 400),
    ("/v1/completions", {**_P, "max_tokens": 10**9}, 400),
    ("/v1/completions", {**_P, "max_tokens": -1}, 400),
    ("/v1/completions", {**_P, "n": 10**6}, 400),
    ("/v1/completions", {**_P, "stop": ["x"] * 10_000}, 400),
    ("/v1/completions", {**_P, "temperature": "warm"}, 400),
    ("/v1/completions", {**_P, "logprobs": 10**4}, 400),
    ("/v1/completions", {**_P, "temprature": 1}, 400),
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b"\x00\xff", 400),
    ("/v1/completions", b" " * (5 << 20), 413),
    ("/v1/chat/completions", {**_C, "messages": []}, 400),
    ("/v1/chat/completions", {**_C, "messages": "hello"}, 400),
    ("/v1/chat/completions", {**_C, "response_format": {"type": "json_object"}}, 400),
    ("/v1/chat/completions", {**_C, "top_logprobs": 3}, 400),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 404),
    ("/v1/load_lora_adapter", {"lora_name": "../x"}, 400),
    ("/v1/unload_lora_adapter", {"lora_name": "nobody"}, 404),
    ("/tokenize", {"prompt": 3}, 400),
    ("/v1/nowhere", {}, 404),
)
BAD_READING: tuple[tuple[str, Any, int], ...] = (
    ("/classify", {"model": "nobody", "input": "x"}, 404),
    ("/classify", {"model": "a0", "input": []}, 400),
    ("/classify", {"model": "a0", "input": ["x"] * 1000}, 400),
    ("/classify", {"model": "a0", "input": "word " * 5000}, 400),
    ("/classify", {"model": "a0", "input": [[10**6]]}, 400),
    ("/classify", {"model": "a0", "inputs": "x"}, 400),
    ("/v1/embeddings", {"model": "a0", "input": 7}, 400),
    ("/v1/embeddings", {"model": "a0", "input": "x", "dimensions": 10**6}, 400),
    ("/v1/embeddings", {"model": "a0", "input": "x", "encoding_format": "morse"}, 400),
    ("/score", {"model": "a0", "text_1": ["a", "b"], "text_2": ["c"]}, 400),
    ("/v1/completions", {"model": "a0", "prompt": "x"}, 400),
    ("/v1/embeddings", b"[1,", 400),
)


class Wrong(Exception):
    """An answer is not what it has to be."""


class Clients:
    """Clients of one process.

    Args:
        url: of the server.
        expected: what `world` wrote.
        seed: of what they do.
        reads: whether the model reads texts, in place of writing them.
    """

    def __init__(self, url: str, expected: dict[str, Any], seed: int, *, reads: bool) -> None:
        self.expected, self.random, self.reads, self.url = expected, random.Random(seed), reads, url
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seeded: dict[tuple[str, int, int], list[str]] = {}
        self.api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
        self.plain = httpx.AsyncClient(base_url=url, timeout=PATIENCE)

    async def run(self, until: float) -> None:
        """Ask until a time."""
        await asyncio.gather(*(self._one(until) for _ in range(CLIENTS)))
        await self.api.close()
        await self.plain.aclose()

    async def _one(self, until: float) -> None:
        ways: dict[Any, int] = {self.err: 10, self.leave: 10}
        if self.reads:
            ways |= {self.classify: 40, self.embed: 40}
        else:
            ways |= {self.complete: 30, self.stream: 20, self.chat: 15, self.draw: 8, self.score: 7}
        while time.time() < until:
            (way,) = self.random.choices(list(ways), list(ways.values()))
            name = self.random.choice(list(MEANS))
            try:
                self.counts[await way(name)] += 1
            except (openai.NotFoundError, openai.BadRequestError) as error:
                self._gone(name, way.__name__, error.status_code, str(error))
            except Exception as error:
                self.wrong.append(f"{way.__name__} of {name}: {type(error).__name__}: {str(error)[:400]}")
            await asyncio.sleep(self.random.expovariate(1 / PAUSE))

    def _gone(self, name: str, way: str, status: int, told: str) -> None:
        """Adapters that come and go may be away, or half written."""
        if name in (VISITOR, GUEST):
            self.counts["away"] += 1
        else:
            self.wrong.append(f"{way} of {name}: {status}: {told[:400]}")

    def _check(self, name: str, kind: str, place: int, most: int, told: str, finish: str | None) -> None:
        for content in MEANS[name]:
            own = self._answer(content, kind, place)
            words = own["words"][:most]
            if told == " ".join(words) and finish == ("length" if len(words) == most else "stop"):
                return
        raise Wrong(f"{kind} {place}, {most} tokens: {told!r} ({finish})")

    def _answer(self, content: str, kind: str, place: int) -> dict[str, Any]:
        at = place + (len(self.expected["prompts"]) if kind == "chat" else 0)
        return self.expected["answers"][content][at]

    def _most(self, name: str, kind: str, place: int) -> int:
        """Tokens to ask for: as far as every content that the name may have is sure."""
        sure = min(self._answer(c, kind, place)["sure"] for c in MEANS[name])
        return self.random.randint(1, max(1, sure))

    def _place(self, kind: str = "prompts") -> int:
        return self.random.randrange(len(self.expected[kind]))

    async def complete(self, name: str) -> str:
        """A text that goes on, with its probabilities."""
        place = self._place()
        most = self._most(name, "prompt", place)
        told = await self.api.completions.create(
            model=name, prompt=self.expected["prompts"][place], max_tokens=most, temperature=0, logprobs=1
        )
        choice = told.choices[0]
        self._check(name, "prompt", place, most, choice.text, choice.finish_reason)
        assert choice.logprobs is not None
        found = np.array(choice.logprobs.token_logprobs or [], float)
        near = [self._answer(c, "prompt", place)["logprobs"][: len(found)] for c in MEANS[name]]
        if not any(len(own) == len(found) and np.allclose(found, own, atol=CLOSE) for own in near):
            raise Wrong(f"probabilities of prompt {place}: {found[:5]}")
        return "completions"

    async def stream(self, name: str) -> str:
        """The same, as it comes."""
        place, text, finish = self._place(), "", None
        most = self._most(name, "prompt", place)
        stream = await self.api.completions.create(
            model=name,
            prompt=self.expected["prompts"][place],
            max_tokens=most,
            temperature=0,
            stream=True,
        )
        async for chunk in stream:
            text += chunk.choices[0].text
            finish = chunk.choices[0].finish_reason or finish
        self._check(name, "prompt", place, most, text, finish)
        return "streams"

    async def chat(self, name: str) -> str:
        """A conversation, streamed or not."""
        place, text, finish = self._place("chats"), "", None
        most = self._most(name, "chat", place)
        asked: dict[str, Any] = {
            "model": name,
            "messages": self.expected["chats"][place],
            "max_tokens": most,
            "temperature": 0,
        }
        if self.random.random() < 0.5:
            told = await self.api.chat.completions.create(**asked)
            text, finish = told.choices[0].message.content or "", told.choices[0].finish_reason
        else:
            async for chunk in await self.api.chat.completions.create(**asked, stream=True):
                text += chunk.choices[0].delta.content or ""
                finish = chunk.choices[0].finish_reason or finish
        self._check(name, "chat", place, most, text, finish)
        return "conversations"

    async def draw(self, name: str) -> str:
        """Three answers drawn with a seed: always the same."""
        place, seed = self._place(), self.random.randrange(4)
        told = await self.api.completions.create(
            model=name, prompt=self.expected["prompts"][place], max_tokens=8, n=3, seed=seed
        )
        texts = [choice.text for choice in told.choices]
        if len(MEANS[name]) == 1 and self.seeded.setdefault((name, place, seed), texts) != texts:
            raise Wrong(f"seed {seed} of prompt {place}: {texts} after {self.seeded[name, place, seed]}")
        return "drawn answers"

    async def score(self, name: str) -> str:
        """The probabilities of a prompt's own tokens."""
        place = self._place()
        told = await self.api.completions.create(
            model=name,
            prompt=self.expected["prompts"][place],
            max_tokens=0,
            echo=True,
            logprobs=0,
        )
        assert told.choices[0].logprobs is not None
        found = np.array((told.choices[0].logprobs.token_logprobs or [])[1:], float)
        near = [self._answer(c, "prompt", place)["read"] for c in MEANS[name]]
        if not any(np.allclose(found, own, atol=CLOSE) for own in near):
            raise Wrong(f"probabilities of the tokens of prompt {place}: {found[:5]}")
        return "scored prompts"

    async def leave(self, name: str) -> str:
        """Ask, and go away before the end."""
        if self.reads:
            body = {"model": name, "input": list(self.expected["prompts"]) * 8}
            with contextlib.suppress(httpx.TimeoutException):
                await self.plain.post("/classify", json=body, timeout=self.random.uniform(0.001, 0.1))
            return "clients that left"
        body = {"model": name, "prompt": "w3 w4", "max_tokens": 1500, "ignore_eos": True, "n": 2}
        if self.random.random() < 0.5:
            with contextlib.suppress(httpx.TimeoutException):
                await self.plain.post("/v1/completions", json=body, timeout=self.random.uniform(0.001, 0.3))
        else:
            async with self.plain.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                lines = answer.aiter_lines()
                for _ in range(self.random.randrange(4)):
                    await anext(lines, None)
        return "clients that left"

    async def err(self, name: str) -> str:
        """A request that cannot be answered."""
        path, body, status = self.random.choice(BAD_READING if self.reads else BAD)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        answer = await self.plain.post(path, content=content, headers=headers)
        if answer.status_code != status or set(answer.json()["error"]) != ERROR:
            raise Wrong(f"{path} {content[:80]!r}: {answer.status_code}, not {status}: {answer.text[:200]}")
        return "bad requests"

    async def classify(self, name: str) -> str:
        """Classes of some texts."""
        name = "a0" if name == "base" else name
        places = [self._place() for _ in range(self.random.randint(1, 8))]
        texts = [self.expected["prompts"][place] for place in places]
        answer = await self.plain.post("/classify", json={"model": name, "input": texts})
        if answer.status_code != 200:
            self._gone(name, "classify", answer.status_code, answer.text)
            return "asked of adapters that were away"
        found = [each["probs"] for each in answer.json()["data"]]
        self._near(name, "probs", places, found)
        return "classifications"

    async def embed(self, name: str) -> str:
        """Vectors of some texts."""
        places = [self._place() for _ in range(self.random.randint(1, 8))]
        told = await self.api.embeddings.create(
            model=name, input=[self.expected["prompts"][place] for place in places]
        )
        self._near(name, "vector", places, [each.embedding for each in told.data])
        return "embeddings"

    def _near(self, name: str, what: str, places: list[int], found: list[list[float]]) -> None:
        for content in MEANS[name]:
            own = [self.expected["answers"][content][place][what] for place in places]
            if list(map(len, own)) == list(map(len, found)) and np.allclose(found, own, atol=1e-5):
                return
        raise Wrong(f"{what} of texts {places}: {str(found)[:200]}")


def run(url: str, expected: str, seconds: float, seed: int, reads: bool, result: str) -> None:
    """Ask in this process for so long, and write down what came of it."""
    clients = Clients(url, json.loads(Path(expected).read_text(encoding="utf-8")), seed, reads=reads)
    asyncio.run(clients.run(time.time() + seconds))
    told = {"counts": clients.counts, "wrong": clients.wrong}
    Path(result).write_text(json.dumps(told), encoding="utf-8")
