"""Completions and conversations, asked by OpenAI's own client."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from endpoints import TEXTS, StandIn, Written
from waiting import PATIENCE

from lorica.serve.http import Served

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["base", "blue", "red"]
    assert found["blue"].model_extra is not None
    assert found["blue"].model_extra["parent"] == "base"
    assert found["blue"].model_extra["rank"] == 4
    assert client.models.retrieve("blue").id == "blue"
    with pytest.raises(openai.NotFoundError, match="no model 'org/blu'"):
        client.models.retrieve("org/blu")


@pytest.mark.parametrize(("model", "adapter"), [("base", None), ("blue", "blue"), ("base:red", "red")])
def test_a_completion(client: openai.OpenAI, engine: StandIn, model: str, adapter: str | None) -> None:
    told = client.completions.create(
        model=model, prompt="Who", max_tokens=100, seed=-3, stop=["☃"], top_p=0.5
    )
    assert told.choices[0].text == TEXTS[adapter]
    assert told.choices[0].finish_reason == "stop"
    assert told.model == model
    assert told.usage is not None
    assert (told.usage.prompt_tokens, told.usage.completion_tokens) == (3, len(TEXTS[adapter].encode()) + 1)
    sampling = engine.sampled[0]
    assert (sampling.seed, sampling.stop, sampling.top_p) == (2**63 - 3, ("☃",), 0.5)
    assert (sampling.temperature, sampling.logprobs) == (1.0, None)


def test_several_prompts_and_choices(client: openai.OpenAI, engine: StandIn) -> None:
    told = client.completions.create(model="red", prompt=["a", "bc"], n=2, seed=7, max_tokens=3, echo=True)
    assert [choice.index for choice in told.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in told.choices] == ["a sa", "a sa", "bc sa", "bc sa"]
    assert [choice.finish_reason for choice in told.choices] == ["length"] * 4
    assert [sampling.seed for sampling in engine.sampled] == [7, 8, 7, 8]
    assert told.usage is not None
    assert (told.usage.prompt_tokens, told.usage.completion_tokens) == (3, 12)


def test_probabilities_of_a_completion(client: openai.OpenAI) -> None:
    told = client.completions.create(model="base", prompt="W☂", max_tokens=2, logprobs=2, echo=True)
    found = told.choices[0].logprobs
    assert told.choices[0].text == "W☂ s"
    assert found is not None
    assert found.tokens == ["W", "�", "�", "�", " ", "s"]
    assert found.text_offset == [0, 1, 2, 3, 4, 5]
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[4] == -9999.0  # of -inf, which JSON cannot say
    assert found.token_logprobs[5] == -0.1
    assert found.top_logprobs is not None
    assert found.top_logprobs[5] == {"s": -0.1, "t": -1.1}


def test_a_prompt_is_scored_without_an_answer(client: openai.OpenAI, engine: StandIn) -> None:
    told = client.completions.create(model="base", prompt="abc", max_tokens=0, logprobs=0, echo=True)
    assert told.choices[0].text == "abc"
    assert told.choices[0].logprobs is not None
    assert told.choices[0].logprobs.token_logprobs == [None, -0.1, -0.1]
    assert engine.sampled[0].max_tokens == 0
    echoed = client.completions.create(model="base", prompt="abc", max_tokens=0, echo=True)
    assert echoed.choices[0].text == "abc"
    assert echoed.usage is not None
    assert echoed.usage.completion_tokens == 0


def test_token_ids_for_a_prompt(client: openai.OpenAI, engine: StandIn) -> None:
    told = client.completions.create(model="base", prompt=[[70, 71], [72]], max_tokens=1, echo=True)
    assert engine.prompts == [[70, 71], [72]]
    assert told.choices[0].text == engine.tokenizer.decode([70, 71]) + " "


def test_a_conversation(client: openai.OpenAI, engine: StandIn) -> None:
    parts: Any = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    told = client.chat.completions.create(
        model="blue",
        messages=[{"role": "system", "content": "be kind"}, {"role": "user", "content": parts}],
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=1,
        temperature=0,
    )
    written = engine.tokenizer.decode(engine.prompts[0])
    assert written == "<system>be kind</system><user>hello</user><assistant>"
    message = told.choices[0]
    assert (message.message.role, message.message.content) == ("assistant", " say")
    assert message.logprobs is not None
    assert message.logprobs.content is not None
    assert [entry.token for entry in message.logprobs.content] == [" ", "s", "a", "y"]
    assert message.logprobs.content[1].bytes == [ord("s")]
    assert message.logprobs.content[1].top_logprobs[0].token == "s"
    assert engine.sampled[0].temperature == 0


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_of_no_tokens_is_refused(client: openai.OpenAI, engine: StandIn, name: str) -> None:
    asked: Any = {name: 0}
    with pytest.raises(openai.BadRequestError, match=f"{name}: .*greater than or equal to 1"):
        client.chat.completions.create(model="base", messages=HELLO, **asked)
    assert not engine.sampled


def test_an_answer_may_fill_the_context_unless_told_otherwise(client: openai.OpenAI, engine: StandIn) -> None:
    client.chat.completions.create(model="base", messages=HELLO)
    assert engine.sampled[0].max_tokens == 200 - len(engine.prompts[0])


def test_a_streamed_conversation(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="base",
            messages=HELLO,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == TEXTS[None]
        assert "�" not in "".join(choice.delta.content or "" for choice in own[:-1])
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
        assert own[-1].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * (len(TEXTS[None].encode()) + 1)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_streamed_completion_is_the_same_as_a_whole_one(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "red",
        "prompt": "fire: ",
        "max_tokens": 12,
        "logprobs": 1,
        "echo": True,
        "stop": ["red"],
    }
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text == "fire:  says "
    assert chunks[-1].choices[0].finish_reason == "stop"
    told = [chunk.choices[0].logprobs for chunk in chunks]
    assert whole.choices[0].logprobs is not None
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for part in told if part is not None for value in getattr(part, name)]
        assert joined == getattr(whole.choices[0].logprobs, name)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"model": "bleu"}, openai.NotFoundError, "did you mean 'blue'"),
        ({"prompt": ""}, openai.BadRequestError, "empty"),
        ({"prompt": []}, openai.BadRequestError, "there is no prompt"),
        ({"prompt": ["a", 1]}, openai.BadRequestError, "prompt: should be a valid"),
        ({"prompt": "x" * 300}, openai.BadRequestError, "300 .* 200"),
        ({"prompt": [5, 9999]}, openai.BadRequestError, "no token 9999"),
        ({"prompt": [-1]}, openai.BadRequestError, "greater than or equal to 0"),
        ({"prompt": ["a"] * 300}, openai.BadRequestError, "300 prompts; 256 are allowed"),
        ({"n": 10**6}, openai.BadRequestError, "1,000,000 choices"),
        ({"n": 16, "prompt": ["a"] * 17}, openai.BadRequestError, "272 answers"),
        ({"stop": ["a"] * 10_000}, openai.BadRequestError, "10000 stop texts"),
        ({"max_tokens": "7"}, openai.BadRequestError, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 0}, openai.BadRequestError, "echo"),
        ({"temperature": -1}, openai.BadRequestError, "greater than or equal to 0"),
        ({"temperature": 3}, openai.BadRequestError, "less than or equal to 2"),
        ({"logprobs": 21}, openai.BadRequestError, "21 most likely tokens"),
        ({"best_of": 3}, openai.BadRequestError, "best_of"),
        ({"suffix": "."}, openai.BadRequestError, "suffix"),
        ({"logit_bias": {"a": 1}}, openai.BadRequestError, "logit_bias"),
        (
            {"extra_body": {"temprature": 1}},
            openai.BadRequestError,
            "'temprature'.* did you mean 'temperature'",
        ),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, openai.BadRequestError, "json_object"),
    ],
)
def test_refused(
    client: openai.OpenAI,
    engine: StandIn,
    change: dict[str, Any],
    error: type[openai.APIStatusError],
    told: str,
) -> None:
    asked: dict[str, Any] = {"model": "blue", "prompt": "x", **change}
    with pytest.raises(error) as caught:
        client.completions.create(**asked)
    body = caught.value.body
    assert isinstance(body, dict)
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert re.search(told, body["message"]), body["message"]
    assert engine.alive
    assert not engine.running


def test_refused_conversations(client: openai.OpenAI, engine: StandIn) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": picture}]}, "text alone"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"extra_body": {"continue_final_message": True, "add_generation_prompt": True}}, "add_generation"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}}, "chat_template_kwargs"),
    ]
    for change, told in cases:
        asked: dict[str, Any] = {"model": "base", "messages": HELLO, **change}
        with pytest.raises(openai.BadRequestError, match=told):
            client.chat.completions.create(**asked)
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        client.chat.completions.create(model="base", messages=HELLO)
    engine.tokenizer.chat_template = None
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="base", messages=HELLO)


def test_an_encoder_is_what_an_embedding_needs(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="base writes text"):
        client.embeddings.create(model="base", input="x")


def test_full_and_dead(client: openai.OpenAI, engine: StandIn) -> None:
    engine.full = True
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="base", prompt="x")
    assert caught.value.response.headers["retry-after"] == "3"
    engine.full, engine.alive = False, False
    with pytest.raises(openai.InternalServerError, match="does not run") as dead:
        client.completions.create(model="base", prompt="x")
    assert dead.value.status_code == 503
    engine.alive, engine.fails_after = True, 0
    with pytest.raises(openai.InternalServerError, match="the engine died"):
        client.completions.create(model="base", prompt="x")
    assert not engine.running


def test_whatever_an_answer_raises_is_told(
    client: openai.OpenAI, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(Written, "_token", fail)
    with pytest.raises(openai.InternalServerError, match="its log says why"):
        client.completions.create(model="base", prompt="x", timeout=PATIENCE)
    with pytest.raises(openai.APIError, match="its log says why"):
        list(client.completions.create(model="base", prompt="x", stream=True, timeout=PATIENCE))
    assert not engine.running


def test_an_adapter_s_own_chat_template_holds(
    serve: Callable[[Served], str], client: openai.OpenAI, engine: StandIn
) -> None:
    engine.adapters.known["red"] = replace(
        engine.adapters.known["red"], template="{% for m in messages %}({{ m.content }}){% endfor %}"
    )

    def laid_out(client: openai.OpenAI, model: str) -> str:
        engine.prompts.clear()
        client.chat.completions.create(model=model, messages=HELLO, max_tokens=1)
        return engine.tokenizer.decode(engine.prompts[0])

    assert laid_out(client, "blue") == laid_out(client, "base") == "<user>hello</user><assistant>"
    assert laid_out(client, "red") == "(hello)"
    told: Any = client.post("/../tokenize", body={"model": "red", "messages": HELLO}, cast_to=object)
    assert told["count"] == len("(hello)")
    plain = serve(Served("base", engine, own_templates=False))
    with openai.OpenAI(base_url=f"{plain}/v1", api_key="none", max_retries=0) as other:
        assert laid_out(other, "red") == "<user>hello</user><assistant>"
