"""`/v1/completions`: a text that goes on."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorica.serve.engine import Step, Token
from lorica.serve.http import probabilities
from lorica.serve.http.answers import Choice, Running, admit, sampling_of, while_there
from lorica.serve.http.errors import refused
from lorica.serve.http.schemas import Completion
from lorica.serve.http.served import Served, key_of, refuse_many, served
from lorica.serve.http.stream import Events, with_usage

router = APIRouter(tags=["text"])


@router.post("/v1/completions")
async def completions(request: Request, body: Completion) -> Response:
    """Go on from each prompt."""
    here, key = served(request), key_of(request)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refused(
            "best_of chooses among answers, which is not offered; leave it out, or set it to n", "best_of"
        )
    if body.suffix:
        raise refused("suffix is not offered: texts are continued, not filled in", "suffix")
    adapter = here.adapter(body.model, key)
    decoder, n = here.decoder, body.n or 1
    prompts = await _prompts(here, body)
    most = 16 if body.max_tokens is None else body.max_tokens
    if most == 0 and not body.echo:
        raise refused("max_tokens is 0; that goes with echo alone, which scores the prompt", "max_tokens")
    sampling = sampling_of(
        body,
        # An answer of no tokens is for the prompt's probabilities alone.
        max_tokens=most if body.logprobs is not None else max(1, most),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    refuse_many("most likely tokens (logprobs)", body.logprobs or 0, decoder.limits.logprobs, "logprobs")
    shaper = Shaper(here, body, request, await _echoes(here, body, prompts))
    running = await admit(here, key, adapter, prompts, sampling, n)
    if body.stream:
        await while_there(request, running.begin(here.settings.keep_alive), running)
        return Events(shaper.chunks(running), running.aclose, here.settings)
    choices: list[Choice] = await while_there(request, running.whole(), running)
    await running.aclose()
    told = [shaper.choice(c, "".join(c.texts), c.tokens, c.finish, first=True) for c in choices]
    return JSONResponse({**shaper.head, "choices": told, "usage": shaper.usage(running)})


async def _prompts(here: Served, body: Completion) -> list[list[int]]:
    """The token ids of each prompt."""
    given: Any = body.prompt
    if isinstance(given, str):
        given = [given]
    if given and isinstance(given[0], int):
        return [given]
    refuse_many("prompts", len(given), here.settings.prompts, "prompt")
    if not given:
        raise refused("there is no prompt", "prompt")
    if isinstance(given[0], str):
        return await here.texts.encode(given, special=body.add_special_tokens is not False)
    return given


async def _echoes(here: Served, body: Completion, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The text before each answer: its prompt, where that is asked for."""
    if not body.echo:
        return [""] * len(prompts)
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], str):
        return list(given)  # type: ignore[arg-type]
    vocabulary = here.limits.vocabulary
    known = [[token for token in prompt if token < vocabulary] for prompt in prompts]
    return [await here.texts.decode(prompt) for prompt in known]


class Shaper:
    """Lays answers out as OpenAI does.

    Args:
        here: the served model.
        body: the request.
        request: its request of HTTP.
        echoes: the text before each prompt's answers.
    """

    def __init__(self, here: Served, body: Completion, request: Request, echoes: Sequence[str]) -> None:
        """Write the fields that all chunks begin with."""
        self._here, self._body, self._echoes = here, body, echoes
        self._offsets = [0] * (len(echoes) * (body.n or 1))
        self.head = {
            "id": f"cmpl-{request.state.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or here.default or here.model,
        }

    def choice(
        self, choice: Choice, text: str, tokens: Sequence[Token], finish: str | None, *, first: bool
    ) -> dict[str, Any]:
        """One choice, or some more of it; the first part begins with the echo."""
        echo = self._echoes[choice.index // (self._body.n or 1)]
        scored = self._body.max_tokens == 0
        listed = [*(choice.read if first else ()), *(() if scored else tokens)]
        logprobs = None
        if self._body.logprobs is not None:
            start = self._offsets[choice.index] if choice.read else self._offsets[choice.index] + len(echo)
            logprobs = probabilities.of_completion(self._here.texts, listed, start, self._body.logprobs)
            self._offsets[choice.index] += sum(map(len, logprobs["tokens"]))
        return {
            "index": choice.index,
            "text": (echo if first else "") + ("" if scored else text),
            "logprobs": logprobs,
            "finish_reason": finish,
        }

    def usage(self, running: Running) -> dict[str, int]:
        """Tokens read and written."""
        usage = running.usage()
        if self._body.max_tokens == 0:
            usage["total_tokens"] -= usage["completion_tokens"]
            usage["completion_tokens"] = 0
        return usage

    async def chunks(self, running: Running) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream."""
        told: set[int] = set()

        def chunk(choice: Choice, step: Step) -> dict[str, Any] | None:
            if not (step.text or step.finish) and self._body.logprobs is None:
                return None  # part of a character, or of what may be a stop text
            first = choice.index not in told
            told.add(choice.index)
            return {
                **self.head,
                "choices": [self.choice(choice, step.text, step.tokens, step.finish, first=first)],
            }

        async for each in with_usage(running, chunk, self._body.stream_options, self.head, self.usage):
            yield each
