"""What goes over the wire: events, comments, errors in the middle, clients that leave, keys, sizes."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from endpoints import StandIn, call
from waiting import until

from lorica.serve.http import Key, Keys, Served, Settings
from lorica.serve.http.stream import Events

ASKED = {"model": "red", "prompt": "x", "max_tokens": 5, "stream": True}


def test_events(url: str) -> None:
    status, headers, text = call(f"{url}/v1/completions", ASKED, **{"X-Request-Id": "mine"})
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    assert headers["Cache-Control"] == "no-cache"
    assert headers["X-Request-Id"] == "mine"
    *events, done, end = text.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert len(events) == 5
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["id"] for chunk in chunks} == {"cmpl-mine"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " says"


def test_an_error_in_the_middle_is_an_event(url: str, engine: StandIn) -> None:
    engine.fails_after = 2
    status, _, text = call(f"{url}/v1/completions", ASKED)
    *events, last, end = text.decode().split("\n\n")
    assert (status, len(events), end) == (200, 2, "")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the engine died"
    assert not engine.running


def test_an_error_before_the_first_token_has_a_status(url: str, engine: StandIn) -> None:
    engine.fails_after = 0
    status, _, body = call(f"{url}/v1/completions", ASKED)
    assert (status, body["error"]["code"]) == (503, "engine_down")


def test_comments_keep_a_silent_stream_open(serve: Callable[[Served], str], engine: StandIn) -> None:
    engine.pause = 0.12
    url = serve(Served("base", engine, Settings(keep_alive=0.05)))
    _, _, text = call(f"{url}/v1/completions", {**ASKED, "max_tokens": 2})
    assert text.decode().count(": waiting\n\n") >= 2
    assert text.decode().endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answers(url: str, engine: StandIn, stream: bool) -> None:
    engine.pause = 0.05
    host = urlsplit(url).netloc
    connection = http.client.HTTPConnection(host)
    body = json.dumps({**ASKED, "max_tokens": 100, "n": 3, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    until(lambda: len(engine.running) == 3)
    answer = connection.getresponse() if stream else None
    if answer is not None:
        answer.read(10)
        answer.close()
    connection.close()
    until(lambda: not engine.running)
    until(lambda: b'endpoint="/v1/completions",status="499"' in call(f"{url}/metrics")[2])


KEYS = "\n".join(
    [
        "# who may ask",
        "sk-first-tenant name=first adapters=blue",
        "",
        # printf sk-operator | sha256sum
        "sha256:2ad86cbee1b4e9cf05dc2c1b2f1cd5ab8f9aeb5d0e0d2ea0b9ec0c5ae1a4b4d4 name=nobody",
        "sk-operator name=ops admin",
    ]
)


@pytest.fixture
def locked(serve: Callable[[Served], str], engine: StandIn, tmp_path: Any) -> str:
    """A server with keys, which lets adapters be loaded."""
    (tmp_path / "keys").write_text(KEYS)
    return serve(Served("base", engine, Settings(allow_load=True), Keys.read(tmp_path / "keys")))


def test_every_path_but_health_needs_a_key(locked: str) -> None:
    paths = call(f"{locked}/openapi.json", key="sk-operator")[2]["paths"]
    assert {"/v1/models", "/v1/completions", "/tokenize", "/metrics", "/stats", "/classify", "/score"} <= set(
        paths
    )
    for path, methods in paths.items():
        for method in methods:
            body = {} if method == "post" else None
            status, headers, told = call(f"{locked}{path.replace('{name}', 'x')}", body)
            if path in ("/health", "/ready"):
                assert status == 200
            else:
                assert (status, told["error"]["code"]) == (401, "invalid_api_key"), path
                assert headers["WWW-Authenticate"] == "Bearer"
    assert call(f"{locked}/v1/models", key="sk-first-tenanT")[0] == 401
    assert call(f"{locked}/v1/models", **{"X-Api-Key": "sk-first-tenant"})[0] == 200
    assert call(f"{locked}/openapi.json")[0] == 401
    assert call(f"{locked}/nowhere")[0] == 401
    assert call(f"{locked}/")[0] == 200  # a page that holds nothing


def test_a_key_sees_its_own_adapters(locked: str, engine: StandIn) -> None:
    key = "sk-first-tenant"
    assert [m["id"] for m in call(f"{locked}/v1/models", key=key)[2]["data"]] == ["base", "blue"]
    assert [a["id"] for a in call(f"{locked}/stats", key=key)[2]["adapters"]] == ["blue"]
    status, _, body = call(f"{locked}/v1/completions", {**ASKED, "stream": False}, key=key)
    assert status == 404
    assert "red" not in body["error"]["message"].replace("'red'", "", 1)
    assert call(f"{locked}/v1/completions", {"model": "blue", "prompt": "x"}, key=key)[0] == 200
    assert engine.tenants == ["first"]


def test_loading_needs_an_operators_key(locked: str, url: str, engine: StandIn) -> None:
    load, unload = f"{locked}/v1/load_lora_adapter", f"{locked}/v1/unload_lora_adapter"
    new = {"lora_name": "green", "lora_path": "good/green"}
    assert call(load, new, key="sk-first-tenant")[0] == 403
    status, _, text = call(load, new, key="sk-operator")
    assert (status, text.decode()) == (200, "Success: LoRA adapter 'green' added successfully.")
    assert call(load, new, key="sk-operator")[0] == 400
    assert call(load, {**new, "load_inplace": True}, key="sk-operator")[0] == 200
    assert call(load, {"lora_name": "x", "lora_path": "../bad"}, key="sk-operator")[0] == 404
    assert call(load, {"lora_name": "base", "lora_path": "good"}, key="sk-operator")[0] == 400
    assert call(load, {"lora_path": "good"}, key="sk-operator")[2]["error"]["param"] == "lora_name"
    assert call(unload, {"lora_name": "green"}, key="sk-operator")[0] == 200
    assert call(unload, {"lora_name": "green"}, key="sk-operator")[0] == 404
    status, _, body = call(f"{url}/v1/load_lora_adapter", new)
    assert (status, body["error"]["code"]) == (403, "not_allowed")


def test_a_key_has_so_many_requests_at_a_time(serve: Callable[[Served], str], engine: StandIn) -> None:
    engine.pause = 0.05
    keys = Keys(Key(hashlib.sha256(f"sk-{name}-tenant".encode()).digest(), name) for name in ("one", "two"))
    url = serve(Served("base", engine, Settings(per_key=1), keys))
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-one-tenant"}
    connection.request("POST", "/v1/completions", json.dumps({**ASKED, "max_tokens": 100}), headers)
    until(lambda: len(engine.running) == 1)
    status, told, body = call(f"{url}/v1/completions", ASKED, key="sk-one-tenant")
    assert (status, body["error"]["code"], told["Retry-After"]) == (429, "rate_limit_exceeded", "1")
    assert call(f"{url}/v1/models", key="sk-one-tenant")[0] == 200
    assert call(f"{url}/v1/completions", {**ASKED, "max_tokens": 1}, key="sk-two-tenant")[0] == 200
    connection.close()
    until(lambda: not engine.running)
    assert call(f"{url}/v1/completions", {**ASKED, "max_tokens": 1}, key="sk-one-tenant")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"", 400, "no body"),
        (b"{", 400, "no JSON"),
        (b"\xff\xfe{}", 400, ""),
        (b"[" * 100_000, 400, ""),
        (b'{"model": "red", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, ""),
        (b"null", 400, ""),
        (b"[]", 400, ""),
        (b'"text"', 400, ""),
        (b'{"model": "red"}', 400, "prompt: Field required"),
        (b'{"model": "\\ud800", "prompt": "x"}', 400, "model"),
        (b'{"model": "red", "prompt": "\\udc00"}', 400, "prompt"),
        (b'{"model": "red", "prompt": "x", "temperature": NaN}', 400, "finite"),
        (b'{"model": "red", "prompt": [[]]}', 400, "empty"),
        (b'{"model": "red", "prompt": [' + b"-1," * 500_000 + b"1]}", 400, ""),
        (b'{"model": "red", "prompt": "x", "\\u0000\\u202e": 1}', 400, "no field"),
        (b'{"model": "' + b"x" * 600 + b'", "prompt": "x"}', 400, "model"),
        (b"x" * (5 << 20), 413, "4,194,304 bytes"),
    ],
)
def test_whatever_is_sent_has_an_answer(
    url: str, engine: StandIn, body: bytes, status: int, told: str
) -> None:
    found, _, answer = call(f"{url}/v1/completions", body)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert told in answer["error"]["message"]
    assert engine.alive
    assert call(f"{url}/health")[0] == 200


def test_a_body_without_a_length_is_counted(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    parts = (b" " * (1 << 20) for _ in range(6))
    connection.request("POST", "/tokenize", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_request_that_never_ends_is_given_up(serve: Callable[[Served], str], engine: StandIn) -> None:
    url = serve(Served("base", engine, Settings(read=0.1)))
    with socket.create_connection(urlsplit(url).netloc.split(":")) as wire:  # type: ignore[arg-type]
        wire.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert wire.recv(100).startswith(b"HTTP/1.1 408")


def test_paths_and_methods_that_are_not_there(url: str) -> None:
    for path, body, status in (
        ("/v1/nothing", None, 404),
        ("/v1/completions", None, 405),
        ("/health", {}, 405),
    ):
        found, _, answer = call(f"{url}{path}", body)
        assert (found, answer["error"]["type"]) == (status, "invalid_request_error")


def test_tokens(url: str) -> None:
    _, _, told = call(f"{url}/tokenize", {"prompt": "hi ☂", "return_token_strs": True})
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) == 6
    assert told["max_model_len"] == 200
    assert call(f"{url}/detokenize", {"tokens": told["tokens"]})[2] == {"prompt": "hi ☂"}
    _, _, laid_out = call(f"{url}/tokenize", {"messages": [{"role": "user", "content": "a"}]})
    text = call(f"{url}/detokenize", {"tokens": laid_out["tokens"]})[2]["prompt"]
    assert text == "<user>a</user><assistant>"
    assert call(f"{url}/tokenize", {})[0] == call(f"{url}/detokenize", {"tokens": [257]})[0] == 400


def test_how_it_is(url: str, engine: StandIn) -> None:
    assert call(f"{url}/health")[2] == {"status": "ok"}
    call(f"{url}/v1/completions", {"model": "blue", "prompt": "abc", "max_tokens": 4})
    status, headers, text = call(f"{url}/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    lines = text.decode().splitlines()
    for line in (
        'lorica:prompt_tokens_total{adapter="blue"} 3.0',
        'lorica:generation_tokens_total{adapter="blue"} 4.0',
        'lorica:request_success_total{finished_reason="length"} 1.0',
        "lorica:time_to_first_token_seconds_count 1.0",
        "lorica:inter_token_latency_seconds_count 3.0",
        "lorica:num_requests_waiting 0.0",
        "lorica:adapters_listed 2.0",
    ):
        assert line in lines
    assert any(
        line.startswith('lorica:lora_requests_info{max_lora="4",running_lora_adapters=""') for line in lines
    )
    told = call(f"{url}/stats")[2]
    assert told["model"] == "base"
    assert told["generated_tokens_per_second"] > 0
    engine.alive = False
    for path in ("/health", "/ready"):
        assert call(f"{url}{path}")[0] == 503


def test_a_client_that_reads_nothing_is_given_up() -> None:
    closed: list[bool] = []

    async def chunks() -> AsyncIterator[dict[str, int]]:
        yield {"n": 1}

    async def close() -> None:
        closed.append(True)

    async def never(*_: object) -> Any:
        await asyncio.sleep(3600)

    scope: dict[str, Any] = {"type": "http", "state": {}}
    events = Events(chunks(), close, Settings(stalled=0.05))
    asyncio.run(asyncio.wait_for(events(scope, never, never), 20))
    assert closed
    assert scope["state"]["status"] == 499
