"""Replicas on Ray Serve: routing, the shared registry and failures, on stand-ins."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray.serve", reason="needs lorica[ray]")

import endpoints
from endpoints import StandIn
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.requests import Request

from lorica.errors import ConfigError
from lorica.serve.http import Served, Settings, make_app
from lorica.serve.ray.ingress import Ingress
from lorica.serve.ray.options import Options, read
from lorica.serve.ray.registry import Change, Follower, Registry, newest
from lorica.serve.ray.replica import BEGUN, ask

pytestmark = pytest.mark.filterwarnings("ignore")


def test_options_are_text_on_the_command_line() -> None:
    found = read({"model": "m", "max-rank": "8", "allow_load": "true", "replicas": "2", "cpus": "0.5"})
    assert found == Options(model="m", max_rank=8, allow_load=True, replicas=2, cpus=0.5)
    for args, words in (
        ({}, "model is missing"),
        ({"model": "m", "slot": 3}, "slots"),
        ({"model": "m", "slots": "many"}, "slots='many'"),
        ({"model": "m", "slots": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(args)


def test_the_registry_numbers_changes_and_replicas_follow(tmp_path: Path) -> None:
    async def go() -> None:
        registry, here = Registry(), Served("base", StandIn())
        follower = Follower(here)
        assert await follower.follow(await registry.note("green", "good/green", True)) == {}
        assert here.adapters.entry("green").pinned
        assert "no folder" in (await follower.follow(await registry.note("grey", "bad")))["grey"]
        # Of a name, the last change counts, in whichever order they come.
        earlier = registry.journal
        await registry.note("green", None)
        await follower.follow(registry.journal)
        await follower.follow(earlier)
        assert "green" not in {entry.name for entry in here.adapters.entries()}
        # A registry that was started again learns from the replicas, and goes on numbering.
        again = Registry()
        assert (await again.sync(follower.journal)) == follower.journal
        later = await again.note("green", "good/new")
        assert later["green"].number > follower.journal["green"].number
        assert newest(later, earlier)["green"] == later["green"]
        # Loading again what was listed keeps the folder that it came from.
        assert (await again.note("green", ""))["green"].path == "good/new"
        # What was put under a name after it was unloaded is not unloaded.
        (tmp_path / "adapter_config.json").write_text("{}")
        here.adapters.known["red"] = endpoints.Entry(name="red", state="listed", path=tmp_path)  # type: ignore[attr-defined]
        await follower.follow({"red": Change(1, None)})
        assert here.adapters.entry("red").path == tmp_path
        await follower.follow({"red": Change(time.time_ns(), None)})
        assert "red" not in {entry.name for entry in here.adapters.entries()}

    asyncio.run(go())


class Replicas:
    """Replicas in this process: what a handle of Ray's does, over applications of stand-in engines."""

    def __init__(self, apps: list[Any], dies: Callable[[int], int | None] = lambda asked: None) -> None:
        self.apps, self.dies, self.asked = apps, dies, 0
        self.sessions: list[str] = []

    def options(self, *, session_id: str = "", **_: Any) -> Replicas:
        self.sessions.append(session_id)
        return self

    def remote(self, scope: Any, body: bytes) -> Messages:
        self.asked += 1
        return Messages(self.apps, scope, body, self.dies(self.asked))

    def broadcast(self, name: str, *args: Any) -> Broadcast:
        return Broadcast(self.apps)


class Messages:
    def __init__(self, apps: list[Any], scope: Any, body: bytes, dies: int | None) -> None:
        self.steps, self.cancelled = self._run(apps, scope, body, dies), False

    async def _run(self, apps: list[Any], scope: Any, body: bytes, dies: int | None) -> AsyncIterator[Any]:
        if not apps:
            await asyncio.sleep(3600)
        if isinstance(apps[0], Exception):
            raise apps[0]
        yield {"type": BEGUN, "model": "base"}
        count = 0
        async for message in ask(apps[0], scope, body):
            if count == dies:
                raise ActorDiedError
            count += 1
            yield message

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> Any:
        return await anext(self.steps)

    def cancel(self) -> None:
        self.cancelled = True


class Broadcast:
    def __init__(self, apps: list[Any]) -> None:
        self.apps = apps

    async def results_async(self, **_: Any) -> list[Any]:
        if not self.apps:
            raise DeploymentUnavailableError("Replica")  # type: ignore[arg-type]
        return [True for _ in self.apps]


def asked(
    replicas: Any, path: str, body: Any = None, *, options: Options | None = None, host: str = "127.0.0.1"
) -> tuple[int, Any, str]:
    """Status, body and headers of one request to an ingress over stand-ins."""

    async def go() -> tuple[int, Any, str]:
        for each in replicas.apps:
            if not isinstance(each, Exception):
                each.state.served.engine.alive = True
        ingress = Ingress(options or Options(model="m"), replicas, None)
        text = json.dumps(body).encode() if not isinstance(body, bytes) else body
        scope = {
            "type": "http",
            "method": "GET" if body is None else "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": (host, 1),
            "root_path": "",
        }
        told = [{"type": "http.request", "body": text, "more_body": False}]
        out: list[Any] = []

        async def receive() -> Any:
            return told.pop() if told else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            out.append(message)

        response = await ingress(Request(scope, receive))
        await response(scope, receive, send)
        content = b"".join(each.get("body", b"") for each in out).decode()
        return out[0]["status"], content, str(out[0]["headers"])

    return asyncio.run(go())


@pytest.fixture
def one() -> Any:
    return make_app(Served("base", StandIn()))


ASKED = {"model": "blue", "prompt": "x", "max_tokens": 40, "temperature": 0}


def test_requests_go_by_their_model_and_the_base_anywhere(one: Any) -> None:
    replicas = Replicas([one])
    for model in ("blue", "base:blue", "red", "base"):
        named = Options(model="m", name="base")
        assert asked(replicas, "/v1/completions", {**ASKED, "model": model}, options=named)[0] == 200
        assert asked(replicas, "/v1/models")[0] == 200
    assert [session for session in replicas.sessions if session] == ["blue", "blue", "red"]


def test_a_dead_replica_costs_nothing_before_an_answer_and_an_error_event_within(one: Any) -> None:
    right = asked(Replicas([one]), "/v1/completions", ASKED)
    assert right[0] == 200
    assert "sky and sea" in right[1]
    for at in (0, 1):
        replicas = Replicas([one], lambda asked, at=at: at if asked == 1 else None)
        found = asked(replicas, "/v1/completions", ASKED)
        assert json.loads(found[1])["choices"] == json.loads(right[1])["choices"]
        assert replicas.asked == 2
    found = asked(Replicas([one], lambda asked: 4), "/v1/completions", {**ASKED, "stream": True})
    assert found[0] == 200
    assert "event-stream" in found[2]
    events = [line.removeprefix("data: ") for line in found[1].splitlines() if line]
    assert json.loads(events[-1])["error"]["code"] == "engine_down"
    assert "[DONE]" not in events
    assert asked(Replicas([one], lambda asked: 0), "/v1/completions", ASKED)[0] == 503


def test_refusals_are_openais_objects(one: Any) -> None:
    full = asked(Replicas([BackPressureError(9, 8)]), "/v1/completions", ASKED)
    assert (full[0], json.loads(full[1])["error"]["type"]) == (429, "rate_limit_error")
    assert "retry-after" in full[2]
    nobody = asked(Replicas([]), "/v1/completions", ASKED)
    assert (nobody[0], json.loads(nobody[1])["error"]["code"]) == (503, "engine_down")
    far = asked(Replicas([one]), "/v1/models", host="10.0.0.7")
    assert (far[0], "anonymous=true" in far[1]) == (403, True)
    open_to_all = Options(model="m", anonymous=True)
    assert asked(Replicas([one]), "/v1/models", host="10.0.0.7", options=open_to_all)[0] == 200
    large = asked(Replicas([one]), "/v1/completions", b" " * (Settings().body + 1))
    assert large[0] == 413
    for body, status in ((b"{", 400), (b"[]", 400), ({**ASKED, "model": "none"}, 404)):
        found = asked(Replicas([one]), "/v1/completions", body)
        assert found[0] == status
        assert json.loads(found[1])["error"]["message"]
    assert asked(Replicas([one]), "/nowhere")[0] == 404


def test_a_client_that_leaves_ends_its_answer(one: Any) -> None:
    engine = one.state.served.engine
    engine.pause = 0.01

    async def go() -> None:
        await engine.start()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        messages = ask(one, scope, json.dumps({**ASKED, "stream": True}).encode())
        assert (await anext(messages))["status"] == 200
        await anext(messages)
        assert engine.running
        await messages.aclose()  # type: ignore[attr-defined]
        assert not engine.running

    asyncio.run(go())
