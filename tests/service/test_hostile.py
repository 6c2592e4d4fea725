"""Requests that are wrong in every way: each is told so, and the service goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from service.server import NAME, service_in
from waiting import PATIENCE

from lorica.service.http import serving
from lorica.service.state.tenants import Tenant, Tenants

pb = pytest.importorskip("tinker.proto.tinker_public_pb2", reason="pip install 'lorica[service]'")


class Client:
    """One tenant's session and run, asked by HTTP alone."""

    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.Client(base_url=url, headers={"x-api-key": key}, timeout=PATIENCE)
        self.prefix = "/api/v1"
        self.session = self.post("create_session", {}).json()["session_id"]
        made = self.done("create_model", session_id=self.session, model_seq_id=0, base_model=NAME,
                         lora_config={"rank": 2, "seed": 0})  # fmt: skip
        self.run, self.seq = made["model_id"], 0

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        given = options or {"json": body}
        return self.http.post(f"{self.prefix}/{path}", **given)

    def answer(self, response: httpx.Response) -> dict[str, Any]:
        """The result behind a future; or what was said at once."""
        assert response.status_code < 500, response.text
        if response.status_code != 200 or "request_id" not in response.json():
            return {"refused": response.status_code, "said": response.text}
        told = self.post("retrieve_future", {"request_id": response.json()["request_id"]})
        assert told.status_code == 200, told.text
        return told.json() if "json" in told.headers["content-type"] else {"bytes": told.content}

    def done(self, path: str, /, **body: Any) -> dict[str, Any]:
        return self.answer(self.post(path, body))

    def of_run(self, path: str, /, **body: Any) -> dict[str, Any]:
        """A call of the run, whose numbers count up; refused at once it used none."""
        told = self.done(path, model_id=self.run, seq_id=self.seq + 1, **body)
        self.seq += "refused" not in told
        return told


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Client]]:
    tenants = Tenants.of({"tml-one": Tenant("one"), "tml-two": Tenant("two")})
    with serving(service_in(tmp_path_factory.mktemp("state"), tenants)) as url:
        both = Client(url, "tml-one"), Client(url, "tml-two")
        yield both
        for client in both:
            client.http.close()


def datum(tokens: Any = (1, 2, 3), **changes: Any) -> dict[str, Any]:
    n = len(tokens) if isinstance(tokens, tuple) else 3
    targets = {"dtype": "int64", "data": [1] * n, "shape": [n], **changes}
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "loss_fn_inputs": {"target_tokens": targets},
    }


LEARN: dict[str, Any] = {
    "data is text": "x",
    "data is a number": 5,
    "no model_input": [{}],
    "tokens are text": [datum("abc")],
    "tokens are fractions": [datum((0.5, 1.5, 2.5))],
    "targets are fractions": [datum(data=[1.5, 2, 3])],
    "tokens are huge": [datum((1, 2, 10**30))],
    "tokens out of range": [datum((1, 2, 10**6))],
    "an empty sequence": [datum(())],
    "a dtype of nobody": [datum(dtype="complex64")],
    "a shape below zero": [datum(shape=[-1])],
    "a shape beyond memory": [datum(shape=[10**9, 10**9])],
    "a shape of others": [datum(shape=[5])],
    "sparse beyond memory": [
        datum(shape=[10**7, 10**7], sparse_crow_indices=[0, 1], sparse_col_indices=[0], data=[1])
    ],
    "sparse columns below zero": [
        datum(shape=[3, 2], sparse_crow_indices=[0, 1, 2, 3], sparse_col_indices=[-1, 0, 0])
    ],
    "an image": [{"model_input": {"chunks": [{"type": "image", "data": ""}]}, "loss_fn_inputs": {}}],
    "a target of nobody": [datum(data=[10**7] * 3)],
}


@pytest.mark.parametrize("name", LEARN)
def test_forward_backward(clients: tuple[Client, Client], name: str) -> None:
    told = clients[0].of_run(
        "forward_backward", forward_backward_input={"data": LEARN[name], "loss_fn": "cross_entropy"}
    )
    assert told.get("refused") == 422 or told.get("category") == "user", told


@pytest.mark.parametrize("body", [b"", b"\xff" * 40, b"{}"])
def test_no_message(clients: tuple[Client, Client], body: bytes) -> None:
    response = clients[0].post(
        "forward_backward", content=body, headers={"content-type": "application/x-protobuf"}
    )
    assert response.status_code in (404, 422)


def test_a_damaged_message_is_told_and_the_run_goes_on(clients: tuple[Client, Client]) -> None:
    one = clients[0]
    message = pb.ForwardBackwardRequest(model_id=one.run, seq_id=one.seq + 1, loss_fn="cross_entropy")
    message.data.add().model_input.add().encoded_text.tokens = b"\x01\x02\x03"
    response = one.post(
        "forward_backward",
        content=message.SerializeToString(),
        headers={"content-type": "application/x-protobuf"},
    )
    one.seq += 1
    assert one.answer(response)["category"] == "user"


STEP: dict[str, Any] = {
    "nothing": {},
    "a number": {"adam_params": 3},
    "unknown fields": {"adam_params": {"learning_rate": 1e-3, "momentum": 1}},
    "text": {"adam_params": {"learning_rate": "fast"}},
    "null": {"adam_params": {"learning_rate": None}},
}


@pytest.mark.parametrize("name", STEP)
def test_optim_step(clients: tuple[Client, Client], name: str) -> None:
    told = clients[0].of_run("optim_step", **STEP[name])
    assert told.get("category") == "user", told


SAMPLE: dict[str, Any] = {
    "no prompt": {"prompt": {"chunks": []}},
    "a prompt of text": {"prompt": {"chunks": [{"tokens": "abc"}]}},
    "a prompt of fractions": {"prompt": {"chunks": [{"tokens": [0.5]}]}},
    "a prompt of nothing": {"prompt": {"chunks": [{"tokens": [None]}]}},
    "a prompt in a list": {"prompt": [1, 2]},
    "huge ids": {"prompt": {"chunks": [{"tokens": [10**40]}]}},
    "ids below zero": {"prompt": {"chunks": [{"tokens": [-1]}]}},
    "a milliard of samples": {"num_samples": 10**9},
    "samples as text": {"num_samples": "many"},
    "no samples": {"num_samples": 0},
    "parameters in a list": {"sampling_params": [1]},
    "infinite tokens": {"sampling_params": {"max_tokens": 1e400}},
    "tokens below zero": {"sampling_params": {"max_tokens": -5}},
    "tokens as text": {"sampling_params": {"max_tokens": "few"}},
    "no temperature": {"sampling_params": {"temperature": None}},
    "a seed beyond bits": {"sampling_params": {"seed": 10**30}},
    "top_k of infinity": {"sampling_params": {"top_k": 1e400}},
    "a stop of nothing": {"sampling_params": {"stop": 5}},
    "stops of dictionaries": {"sampling_params": {"stop": [{}]}},
    "another base": {"base_model": "somebody/else"},
    "a checkpoint of nobody": {"model_path": "tinker://../../etc/weights/passwd"},
}


@pytest.mark.parametrize("name", SAMPLE)
def test_asample(clients: tuple[Client, Client], name: str) -> None:
    body = {
        "prompt": {"chunks": [{"tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": 1},
        "base_model": NAME,
        **SAMPLE[name],
    }
    response = clients[0].post("asample", content=json.dumps(body))
    assert len(response.content) < 100_000
    told = clients[0].answer(response)
    assert told.get("refused") in (404, 422) or told.get("category") == "user", told


MODEL: dict[str, Any] = {
    "a rank beyond memory": {"lora_config": {"rank": 10**9}},
    "a rank as text": {"lora_config": {"rank": "8"}},
    "no rank": {"lora_config": {"rank": 0}},
    "unknown fields": {"lora_config": {"rank": 2, "alpha": 3}},
    "a list": {"lora_config": [2]},
    "a number": {"lora_config": 2},
    "a seed beyond bits": {"lora_config": {"rank": 2, "seed": 10**30}},
    "another base": {"base_model": "somebody/else"},
    "no layers": {
        "lora_config": {"rank": 2, "train_mlp": False, "train_attn": False, "train_unembed": False}
    },
}


@pytest.mark.parametrize("name", MODEL)
def test_create_model(clients: tuple[Client, Client], name: str) -> None:
    one, number = clients[0], 10 + list(MODEL).index(name)
    told = one.done("create_model", **{"session_id": one.session, "model_seq_id": number, **MODEL[name]})
    assert told.get("category") == "user", told


NUMBERS = [-1, 1 << 62, 10**30, 1.5, "1", None, True]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("path", ["optim_step", "save_weights", "create_model", "asample"])
def test_numbers_of_calls(clients: tuple[Client, Client], path: str, number: Any) -> None:
    one = clients[0]
    names = {"create_model": ("session_id", one.session, "model_seq_id")}
    target, of, seq = names.get(path, ("model_id", one.run, "seq_id"))
    if path == "asample":
        target, of = "sampling_session_id", f"{one.session}:sample:0"
    response = one.post(path, {target: of, seq: number})
    assert response.status_code in (404, 422), response.text


def test_the_body(clients: tuple[Client, Client]) -> None:
    one = clients[0]
    for content in (b"", b"[]", b"nan", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'"x"'):
        for path in ("optim_step", "create_session", "weights_info", "sessions/search"):
            assert one.post(path, content=content).status_code < 500, (path, content[:20])
    packed = {"content-encoding": "zstd"}
    assert one.post("optim_step", content=b"no zstd", headers=packed).status_code == 422


@pytest.mark.parametrize("name", ["../../x", "a/b", "", "x" * 300, 5, None, [], "é", ".", ".."])
def test_names_of_checkpoints(clients: tuple[Client, Client], name: Any) -> None:
    told = clients[0].of_run("save_weights", path=name)
    # No name is one: the call's own number.
    assert told.get("category") == "user" or (not name and "path" in told), told


def test_lists_and_times(clients: tuple[Client, Client]) -> None:
    one = clients[0]
    saved = one.of_run("save_weights", path="kept")
    place = f"/api/v1/training_runs/{one.run}/checkpoints/weights/kept"
    assert saved["path"].endswith("/weights/kept")
    for ttl in ("x", float("1e300"), -5, [], 0):
        assert one.http.put(f"{place}/ttl", json={"ttl_seconds": ttl}).status_code == 422, ttl
    assert one.http.put(f"{place}/ttl", content=b'{"ttl_seconds": NaN}').status_code == 422
    for query in ("limit=-1", "offset=-5", "limit=x", f"limit={10**30}"):
        assert one.http.get(f"/api/v1/training_runs?{query}").status_code == 422, query
    for query in (f"until={10**30}&sign=x", "until=-1&sign=x", "until=99999999999&sign=%C3%A9", "until=1"):
        assert one.http.get(f"{place}/files/adapter_config.json?{query}").status_code in (403, 422), query


def test_another_tenants(clients: tuple[Client, Client]) -> None:
    one, two = clients
    for path, body in (
        ("optim_step", {"model_id": one.run, "seq_id": 1, "adam_params": {}}),
        ("save_weights", {"model_id": one.run, "seq_id": 1}),
        ("unload_model", {"model_id": one.run}),
        ("get_info", {"model_id": one.run}),
        ("session_heartbeat", {"session_id": one.session}),
        ("create_model", {"session_id": one.session, "model_seq_id": 99}),
        ("retrieve_future", {"request_id": f"{one.run}:1"}),
        ("cancel_future", {"request_id": f"{one.run}:1"}),
        ("weights_info", {"tinker_path": f"tinker://{one.run}/weights/kept"}),
    ):
        assert two.post(path, body).status_code in (404, 410), path
    assert two.http.get(f"/api/v1/training_runs/{one.run}").status_code == 404
    assert (
        one.http.post("/api/v1/create_session", json={}, headers={"x-api-key": "tml-none"}).status_code == 401
    )


def test_all_goes_on_after_that(clients: tuple[Client, Client]) -> None:
    for client in clients:
        learned = client.of_run(
            "forward_backward", forward_backward_input={"data": [datum()], "loss_fn": "cross_entropy"}
        )
        assert "bytes" in learned, learned
        assert client.of_run("optim_step", adam_params={"learning_rate": 1e-3})["type"] == "optim_step"
        assert client.http.get("/api/v1/healthz").json() == {"status": "ok"}
