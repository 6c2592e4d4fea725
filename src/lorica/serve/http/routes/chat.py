"""`/v1/chat/completions`: the next message of a conversation."""

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
from lorica.serve.http.schemas import Chat, Message
from lorica.serve.http.served import Served, key_of, refuse_many, served
from lorica.serve.http.stream import Events, with_usage

router = APIRouter(tags=["text"])


@router.post("/v1/chat/completions")
async def chat(request: Request, body: Chat) -> Response:
    """Answer a conversation."""
    here, key = served(request), key_of(request)
    adapter = here.adapter(body.model, key)
    decoder = here.decoder
    if body.modalities not in (None, ["text"]):
        raise refused("modalities: answers are text", "modalities")
    if isinstance(body.tool_choice, dict) or body.tool_choice not in (None, "none", "auto"):
        raise refused(
            "tool_choice: answers are text; the model may write a call, and none is forced", "tool_choice"
        )
    top = body.top_logprobs or 0
    if top and not body.logprobs:
        raise refused("top_logprobs needs logprobs: true", "top_logprobs")
    refuse_many("most likely tokens (top_logprobs)", top, decoder.limits.logprobs, "top_logprobs")
    prompt = await lay_out(here, adapter, body.messages, body)
    most = body.max_completion_tokens or body.max_tokens
    if most is None:
        most = max(1, decoder.limits.context - len(prompt))
    sampling = sampling_of(body, max_tokens=most, logprobs=top if body.logprobs else None)
    running = await admit(here, key, adapter, [prompt], sampling, body.n or 1)
    shaper = Shaper(here, body, request)
    if body.stream:
        await while_there(request, running.begin(here.settings.keep_alive), running)
        return Events(shaper.chunks(running), running.aclose, here.settings)
    choices: list[Choice] = await while_there(request, running.whole(), running)
    await running.aclose()
    told = [shaper.choice(choice) for choice in choices]
    head = {**shaper.head, "object": "chat.completion"}
    return JSONResponse({**head, "choices": told, "usage": running.usage()})


async def lay_out(here: Served, adapter: str | None, messages: Sequence[Message], body: Any) -> list[int]:
    """The token ids of a conversation.

    Args:
        here: the served model.
        adapter: whose chat template holds, where it brings one.
        messages: of the conversation.
        body: a request, with its settings of the template.
    """
    refuse_many("messages", len(messages), here.settings.messages, "messages")
    plain = [
        {**message.model_dump(exclude_none=True), "content": _content(message, i)}
        for i, message in enumerate(messages)
    ]
    go_on = bool(getattr(body, "continue_final_message", None))
    begin = body.add_generation_prompt
    return await here.texts.chat(
        plain,
        template=here.template(adapter),
        tools=getattr(body, "tools", None),
        begin=not go_on if begin is None else begin,
        go_on=go_on,
        settings=getattr(body, "chat_template_kwargs", None),
    )


def _content(message: Message, place: int) -> str:
    """A message's text, of its parts where it has some."""
    if not isinstance(message.content, list):
        return message.content or ""
    for part in message.content:
        if part.type not in ("text", "input_text") or part.text is None:
            raise refused(
                f"a message's part is {part.type[:100]!r}; this model reads text alone",
                f"messages.{place}.content",
            )
    return "".join(part.text or "" for part in message.content)


class Shaper:
    """Lays answers out as OpenAI does.

    Args:
        here: the served model.
        body: the request.
        request: its request of HTTP.
    """

    def __init__(self, here: Served, body: Chat, request: Request) -> None:
        """Write the fields that all chunks begin with."""
        self._here, self._body = here, body
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{request.state.id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": body.model or here.default or here.model,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return probabilities.of_chat(self._here.texts, tokens, self._body.top_logprobs or 0)

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A whole answer."""
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish,
        }

    async def chunks(self, running: Running) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream: of each answer first the role, then the text."""
        for choice in running.choices:
            yield self._chunk(choice.index, {"role": "assistant", "content": ""}, None, None)

        def chunk(choice: Choice, step: Step) -> dict[str, Any] | None:
            if not (step.text or step.finish or self._body.logprobs):
                return None  # part of a character, or of what may be a stop text
            delta = {"content": step.text} if step.text or not step.finish else {}
            return self._chunk(choice.index, delta, self._logprobs(step.tokens), step.finish)

        async for each in with_usage(running, chunk, self._body.stream_options, self.head, Running.usage):
            yield each

    def _chunk(self, index: int, delta: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
        told = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head, "choices": [told]}
