"""Two replicas on a cluster of Ray's: their answers, one registry, one of them killed under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray.serve", reason="needs lorica[ray]")

import endpoints
import psutil
from on_ray import cluster
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from serving import decoder, write_adapter
from waiting import until

from lorica.serve.http import Served, make_app
from lorica.serve.opening import look_at, open_engine
from lorica.serve.ray import app
from lorica.serve.ray.replica import ask

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = [f"tenant-{i}" for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, a small decoder; ``adapters``, six for it; ``more/late``, one that is loaded later."""
    folder = tmp_path_factory.mktemp("ray")
    model = decoder("llama", vocab_size=257)
    model.save_pretrained(folder / "model")
    endpoints.tokenizer().save_pretrained(folder / "model")
    for i, name in enumerate([*NAMES, "late"]):
        where = folder / "adapters" / name if name in NAMES else folder / "adapters" / "hidden" / name
        write_adapter(model, where, {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}, i)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with cluster(forked=False):  # what its processes import is asserted
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            app(
                {
                    "model": str(folder / "model"),
                    "adapters": str(folder / "adapters"),
                    "slots": 4,
                    "replicas": 2,
                    "cpus": 0.5,
                    "ongoing": 8,
                    "queue": 8,
                    "drain": 1,
                    "allow-load": True,
                    "name": "base",
                }
            )
        )
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def right(folder: Path) -> dict[tuple[str, str], str]:
    """What each name answers to each prompt, where it is asked alone."""
    engine = open_engine(
        look_at(str(folder / "model")), [folder / "adapters", folder / "adapters" / "hidden"]
    )
    here = Served("base", engine)

    async def go() -> dict[tuple[str, str], str]:
        found = {}
        application = make_app(here)
        async with application.router.lifespan_context(application):
            for name in [*NAMES, "late", "base"]:
                for prompt in PROMPTS:
                    body = json.dumps(question(name, prompt)).encode()
                    scope = {
                        "type": "http",
                        "method": "POST",
                        "path": "/v1/completions",
                        "query_string": b"",
                        "headers": [(b"content-type", b"application/json")],
                    }
                    _, content = [message async for message in ask(application, scope, body)]
                    found[name, prompt] = json.loads(content["body"])["choices"][0]["text"]
        return found

    return asyncio.run(go())


PROMPTS = ("once", "a longer text", "3 + 4")


def question(name: str, prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0, **fields}


def answer(url: str, name: str, prompt: str, *, stream: bool = False) -> tuple[int, str | None, Any]:
    """Status, text and error of an answer; the text of a stream is that of its events."""
    status, _, told = endpoints.call(f"{url}/v1/completions", question(name, prompt, stream=stream))
    if status != 200:
        return status, None, told["error"]
    if not stream:
        return status, told["choices"][0]["text"], None
    events = [line.removeprefix("data: ") for line in told.decode().splitlines() if line.startswith("data")]
    if events[-1] != "[DONE]":
        return status, None, json.loads(events[-1])["error"]
    return status, "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1]), None


def pids(deployment: str = "Replica") -> list[int]:
    """Processes of a deployment's replicas in this process's own cluster."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if f"ServeReplica:default:{deployment}" in " ".join(each.cmdline()[:1]):
                found.append(each.pid)
    return found


def test_two_replicas_answer_as_one_and_lose_one(
    url: str, folder: Path, right: dict[tuple[str, str], str]
) -> None:
    assert len(set(right.values())) > 12, "the adapters differ"
    for stream in (False, True):
        for name, prompt in right:
            if name != "late":
                assert answer(url, name, prompt, stream=stream) == (200, right[name, prompt], None)
    # What passes requests on has no engine.
    (ingress,) = pids("Ingress")
    assert "torch" not in Path(f"/proc/{ingress}/maps").read_text()
    # Each adapter's requests went together to one replica.
    at: dict[str, set[str]] = {name: set() for name in NAMES}
    for line in endpoints.call(f"{url}/metrics")[2].decode().splitlines():
        if line.startswith("lorica:requests_total"):
            labels = dict(part.split("=") for part in line[line.index("{") + 1 : line.index("}")].split(","))
            name, replica = (labels[key].strip('"') for key in ("adapter", "replica"))
            if name in at and not line.endswith(" 0.0"):
                at[name].add(replica)
    assert all(len(replicas) == 1 for replicas in at.values()), at

    # Loading and unloading reach both replicas.
    late = {"lora_name": "late", "lora_path": str(folder / "adapters" / "hidden" / "late")}
    assert endpoints.call(f"{url}/v1/load_lora_adapter", late)[0] == 200
    gone = {"lora_name": NAMES[0]}
    assert endpoints.call(f"{url}/v1/unload_lora_adapter", gone)[0] == 200
    for _ in range(6):
        listed = {card["id"] for card in endpoints.call(f"{url}/v1/models")[2]["data"]}
        assert listed == {"base", "late", *NAMES[1:]}
    assert (
        endpoints.call(f"{url}/v1/load_lora_adapter", {**late, "lora_name": "no", "lora_path": "/"})[0] == 404
    )

    # One replica is killed under load.
    outcomes: Counter[str] = Counter()
    recovering, ending = threading.Event(), threading.Event()

    def load(seed: int) -> None:
        draw = random.Random(seed)
        while not ending.is_set():
            name, prompt = draw.choice(["base", "late", *NAMES[1:]]), draw.choice(PROMPTS)
            status, text, error = answer(url, name, prompt, stream=draw.random() < 0.5)
            if text is not None:
                outcomes["right" if text == right[name, prompt] else "wrong"] += 1
            else:
                told = error["code"] in ("engine_down", "overloaded")
                outcomes[f"{'told' if told else 'untold'} {status}"] += 1
            if recovering.is_set():
                ending.wait(0.3)  # and leave the machine to the one that starts

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    killed, *_ = before = pids()
    time.sleep(1)
    os.kill(killed, signal.SIGKILL)
    time.sleep(1)
    recovering.set()
    handle = serve.get_deployment_handle("Replica", "default")

    def whole() -> bool:
        there = pids()
        return len(there) == 2 and killed not in there and alive(handle) == 2

    until(whole, "the replica in the place of the one that was killed", every=0.5)
    time.sleep(1)
    ending.set()
    for thread in threads:
        thread.join()
    assert len(before) == 2
    assert outcomes["right"] > 20
    assert not outcomes["wrong"]
    assert not [each for each in outcomes if each.startswith("untold")], outcomes
    # The one that was started knows what was loaded and unloaded before.
    for _ in range(6):
        listed = {card["id"] for card in endpoints.call(f"{url}/v1/models")[2]["data"]}
        assert listed == {"base", "late", *NAMES[1:]}
    for name in ("late", *NAMES[1:]):
        assert answer(url, name, "once") == (200, right[name, "once"], None)

    # More than fits: some are refused, none is lost.
    statuses: Counter[int] = Counter()

    def burst() -> None:
        statuses[answer(url, "base", "once")[0]] += 1

    threads = [threading.Thread(target=burst) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses[429]
    assert statuses[200]
    assert statuses[200] + statuses[429] == 60

    # Without a replica: OpenAI's error, at once.
    for pid in pids():
        os.kill(pid, signal.SIGKILL)
    status, _, error = answer(url, "base", "once")
    assert status == 503
    assert error["code"] == "engine_down"


def alive(handle: Any) -> int:
    """Replicas that take requests."""
    try:
        told = handle.broadcast("alive").results(timeout_s=10, return_exceptions=True)
    except (TimeoutError, DeploymentUnavailableError):
        return 0
    return sum(each is True for each in told)
