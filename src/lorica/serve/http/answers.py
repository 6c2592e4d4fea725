"""From a request's fields to answers that run, and from their steps, in any order, to the response.

prompts × n ──▶ admit all or none ──▶ steps of all, as they come ──▶ gathered, or streamed
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio
from fastapi import Request

from lorica.serve.engine import Answer, Sampling, Step, Token
from lorica.serve.http.errors import refused
from lorica.serve.http.gate import Left
from lorica.serve.http.keys import Key
from lorica.serve.http.schemas import Drawn
from lorica.serve.http.served import Served, refuse_many

T = TypeVar("T")

_SEEDS = 2**63


def sampling_of(body: Drawn, **more: Any) -> Sampling:
    """The sampling that a request asks for.

    Args:
        body: the request.
        more: fields of `Sampling` whose names differ between completions and conversations.

    Raises:
        ApiError: it asks for a feature that this server does not have.
    """
    if body.response_format is not None and body.response_format.type != "text":
        raise refused(
            f"response_format {body.response_format.type[:100]!r} is not offered; answers are text",
            "response_format",
        )
    plain = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    given = {name: value for name in plain if (value := getattr(body, name)) is not None}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    try:
        bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
    except ValueError:
        raise refused("logit_bias maps token ids to numbers", "logit_bias") from None
    return Sampling(
        **given,
        **more,
        top_k=max(0, body.top_k or 0),
        seed=None if body.seed is None else body.seed % _SEEDS,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logit_bias=bias,
    )


@dataclass
class Choice:
    """One answer that runs, and its result.

    Args:
        index: its place among the choices.
        prompt: token ids that it continues from.
        answer: the engine's.
    """

    index: int
    prompt: Sequence[int]
    answer: Answer
    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    read: tuple[Token, ...] = ()
    finish: str | None = None

    def take(self, step: Step) -> None:
        """Add a step's tokens and text."""
        self.texts.append(step.text)
        self.tokens += step.tokens
        self.read = step.prompt or self.read
        self.finish = step.finish or self.finish


class Running:
    """The answers to one request.

    Args:
        served: the served model.
        adapter: whose they are.
        choices: the answers.
    """

    def __init__(self, served: Served, adapter: str | None, choices: list[Choice]) -> None:
        """Start to wait for them."""
        self.choices, self._served, self._adapter = choices, served, adapter
        self._steps: asyncio.Queue[tuple[Choice, Step] | Exception | None] = asyncio.Queue(64)
        self._tasks = [asyncio.create_task(self._follow(choice)) for choice in choices]
        self._ahead: tuple[Choice, Step] | Exception | None = None
        self._left = len(choices)
        self._begun = time.perf_counter()

    async def _follow(self, choice: Choice) -> None:
        """Pass on the steps of one answer."""
        metrics, last, first, finish = self._served.metrics, self._begun, True, "abort"
        try:
            async for step in choice.answer:
                now = time.perf_counter()
                if step.tokens:
                    metrics.stepped(self._adapter, len(step.tokens), now - last, first=first)
                    last, first = now, False
                finish = step.finish or finish
                await self._steps.put((choice, step))
            metrics.ended(finish, time.perf_counter() - self._begun)
            await self._steps.put(None)
        except asyncio.CancelledError:
            metrics.ended("abort", time.perf_counter() - self._begun)
            raise
        except Exception as error:  # whatever it is: who waits for steps must learn of it
            metrics.ended("error", time.perf_counter() - self._begun)
            await self._steps.put(error)

    async def begin(self, patience: float) -> None:
        """Wait for the first step, which `next` then returns, for so many seconds at most.

        An error that comes before it still has a status of its own; later ones are told in the stream.

        Raises:
            LoricaError: an answer failed.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                self._ahead = await self._steps.get()
        if isinstance(self._ahead, Exception):
            raise self._ahead

    async def next(self) -> tuple[Choice, Step] | None:
        """The next step of whichever answer has one, which has taken it; None once all are whole.

        Raises:
            LoricaError: an answer failed.
        """
        while self._left:
            found, self._ahead = self._ahead or await self._steps.get(), None
            if found is None:
                self._left -= 1
                continue
            if isinstance(found, Exception):
                raise found
            found[0].take(found[1])
            return found
        return None

    async def __aiter__(self) -> AsyncIterator[tuple[Choice, Step]]:
        """All steps."""
        while (found := await self.next()) is not None:
            yield found

    async def whole(self) -> list[Choice]:
        """The answers, once all are whole."""
        async for _ in self:
            pass
        return self.choices

    async def aclose(self) -> None:
        """Cancel what still runs, and free what it held; also where the caller is being cancelled."""
        with anyio.CancelScope(shield=True):
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for choice in self.choices:
                await choice.answer.aclose()

    def usage(self) -> dict[str, int]:
        """Tokens read, each prompt once, and written, by now."""
        prompts = {id(choice.prompt): len(choice.prompt) for choice in self.choices}
        read, written = sum(prompts.values()), sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def admit(
    served: Served,
    key: Key,
    adapter: str | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    n: int,
) -> Running:
    """Queue `n` answers to each prompt; all or none.

    Raises:
        ApiError: there are too many of them.
        LoricaError: the engine refuses one.
    """
    settings = served.settings
    refuse_many("prompts", len(prompts), settings.prompts, "prompt")
    refuse_many("choices (n)", n, settings.choices, "n")
    refuse_many("answers (prompts × n)", len(prompts) * n, settings.answers, "n")
    choices: list[Choice] = []
    try:
        for prompt in prompts:
            for i in range(n):
                own = (
                    sampling
                    if sampling.seed is None
                    else replace(sampling, seed=(sampling.seed + i) % _SEEDS)
                )
                answer = served.decoder.admit(prompt, adapter, own, tenant=key.name)
                choices.append(Choice(len(choices), prompt, answer))
    except BaseException:
        for choice in choices:
            await choice.answer.aclose()
        raise
    for prompt in prompts:
        served.metrics.began(adapter, len(prompt))
    return Running(served, adapter, choices)


async def while_there(request: Request, work: Any, running: Running | None = None) -> Any:
    """A coroutine's result, unless the client leaves before: then it is cancelled.

    Args:
        request: whose client it is.
        work: the coroutine.
        running: answers to close where it does not return.

    Raises:
        Left: the client left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Left
        return await task
    except BaseException:
        if running is not None:
            await running.aclose()
        raise
    finally:
        with anyio.CancelScope(shield=True):
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
