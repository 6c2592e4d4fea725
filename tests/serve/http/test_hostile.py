"""Whatever is sent to a server over a real engine has an error of its own, and the engine goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers.generation.continuous_batching", reason="needs lorica[serve]")

import safetensors.torch
import torch
from endpoints import call, tokenizer
from serving import KINDS, decoder, write_adapter
from waiting import until

import lorica
from lorica.serve import Decoder
from lorica.serve.http import Served, Settings

P = "/v1/completions"
C = "/v1/chat/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
INFINITE = "huge gives NaN or infinity"
HELLO = [{"role": "user", "content": "hello"}]
OTHERS: dict[str, dict[str, Any]] = {
    "replicated": {"r": 2, "target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]},
    "whole": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "parameters": {"r": 2, "target_parameters": ["mlp.up_proj.weight"]},
    "high": {"r": 12, "target_modules": ["q_proj"]},
    "replaced": {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.1},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A decoder of bytes, one adapter for it, and a folder of such as cannot be served."""
    root = tmp_path_factory.mktemp("root")
    model = decoder("llama", vocab_size=257)
    write_adapter(model, root / "blue", KINDS["some"])
    _overflow(write_adapter(model, root / "huge", KINDS["all"]))
    for name, config in OTHERS.items():
        write_adapter(model, root / "others" / name, config)
    cases = root / "others"
    for name in ("half", "bare", "linked", "listed", "pickled", "method", "nan", "negative", "template"):
        shutil.copytree(root / "blue", cases / name)
    weights = "adapter_model.safetensors"
    (cases / "half" / weights).write_bytes((cases / "half" / weights).read_bytes()[:-64])
    (cases / "bare" / weights).unlink()
    (root.parent / "secret").write_bytes((root / "blue" / weights).read_bytes())
    (cases / "linked" / weights).unlink()
    (cases / "linked" / weights).symlink_to(root.parent / "secret")
    (cases / "out").symlink_to(root.parent)
    (cases / "listed" / "adapter_config.json").write_text("[]")
    (cases / "pickled" / weights).unlink()
    torch.save({}, cases / "pickled" / "adapter_model.bin")
    (cases / "template" / "chat_template.jinja").write_bytes(b"\xff")
    for name, fields in {
        "method": {"peft_type": "IA3"},
        "nan": {"lora_alpha": 1e400},
        "negative": {"r": -4},
    }.items():
        path = cases / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    own = Decoder(model, tokenizer(), adapters=root, max_rank=8, slots=2, watch=0, queue=64)
    own.tokenizer.model_max_length = 10**9
    return own


def _overflow(folder: Path) -> None:
    """Finite weights whose products are not."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: 1e30 * value for name, value in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path)


@pytest.fixture(scope="module")
def url(serve_long: Callable[[Served], str], engine: Decoder) -> str:
    return serve_long(Served("base", engine, Settings(allow_load=True)))


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "blue", "prompt": "x", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "blue", "messages": HELLO, **fields}


def load(name: str, path: str) -> dict[str, Any]:
    return {"lora_name": name, "lora_path": f"{{root}}/{path}"}


HOSTILE: tuple[tuple[str, Any, int, str], ...] = (
    (P, completion(model="blew"), 404, "did you mean 'blue'"),
    (P, completion(model="../blue"), 404, "no model"),
    (P, completion(model="base:nobody"), 404, "no model"),
    (P, completion(model=["blue"]), 400, "model"),
    (P, completion(prompt=""), 400, "empty"),
    (P, completion(prompt=[]), 400, "no prompt"),
    (P, completion(prompt=[[]]), 400, "empty"),
    (P, completion(prompt=["x", ""]), 400, "empty"),
    (P, completion(prompt=["x", [3]]), 400, "prompt"),
    (P, completion(prompt="x" * 161), 400, "161"),
    (P, completion(prompt="x" * 100, max_tokens=61), 400, "100 tokens and max_tokens is 61"),
    (P, completion(prompt="x" * 1_000_000), 400, "1,000,000 tokens"),
    (P, completion(prompt=["x"] * 257), 400, "257"),
    (P, completion(prompt=[257]), 400, "257"),
    (P, completion(prompt=[2**31]), 400, "prompt"),
    (P, completion(prompt=[3.5]), 400, "prompt"),
    (P, completion(prompt=[True]), 400, "prompt"),
    (P, completion(max_tokens=0), 400, "max_tokens"),
    (P, completion(max_tokens=2**31 - 1), 400, "max_tokens"),
    (P, completion(max_tokens="16"), 400, "max_tokens"),
    (P, completion(n=0), 400, "n"),
    (P, completion(n=10**6), 400, "1,000,000"),
    (P, completion(prompt=["x"] * 100, n=16), 400, "1,600"),
    (P, completion(stop=["x"] * 10_000), 400, "10,000"),
    (P, completion(stop=""), 400, "stop"),
    (P, completion(stop=["x" * 300]), 400, "stop"),
    (P, completion(stop_token_ids=[10**6]), 400, "stop_token_ids"),
    (P, completion(temperature=-1), 400, "temperature"),
    (P, completion(top_p=0), 400, "top_p"),
    (P, completion(top_p=1.5), 400, "top_p"),
    (P, completion(repetition_penalty=0), 400, "repetition_penalty"),
    (P, completion(logprobs=10**6), 400, "logprobs"),
    (P, completion(logit_bias={"257": 1}), 400, "logit_bias"),
    (P, completion(logit_bias={"x": 1}), 400, "logit_bias"),
    (P, completion(logit_bias={"0" * i + "1": 1 for i in range(301)}), 400, "301 entries"),
    (P, completion(logit_bias={"9" * 5000: 1}), 400, "logit_bias"),
    (P, completion(model="huge"), 400, INFINITE),
    (P, completion(model="huge", temperature=0, stream=True), 400, INFINITE),
    (
        P,
        completion(model="huge", prompt="xy", max_tokens=0, echo=True, logprobs=1),
        400,
        INFINITE,
    ),
    (P, completion(seed=2**70), 400, "seed"),
    (P, completion(best_of=4), 400, "best_of"),
    (P, completion(suffix="x"), 400, "suffix"),
    (P, completion(stream="yes"), 400, "stream"),
    (P, completion(stream_options={"include_usage": 3}), 400, "stream_options"),
    (P, completion(response_format={"type": "json_schema"}), 400, "response_format"),
    (P, completion(temprature=1), 400, "did you mean 'temperature'"),
    (C, chat(messages=[]), 400, "messages"),
    (C, chat(messages=[{"role": "user", "content": "x"}] * 1025), 400, "1,025"),
    (C, chat(messages=[{"content": "x"}]), 400, "role"),
    (C, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "image_url"),
    (C, chat(messages=[{"role": "user", "content": "x" * 1000}]), 400, "at most"),
    (C, chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}), 400, "chat_template_kwargs"),
    (C, chat(chat_template="{{ 1 }}"), 400, "no field"),
    (C, chat(tool_choice="required"), 400, "tool_choice"),
    (C, chat(top_logprobs=5), 400, "top_logprobs"),
    (C, chat(logprobs=True, top_logprobs=10**6), 400, "top_logprobs"),
    ("/tokenize", {"prompt": "x", "messages": HELLO}, 400, "not both"),
    ("/detokenize", {"tokens": [257]}, 400, "257"),
    ("/detokenize", {"tokens": [5] * 1_000_000}, 400, "1,000,000"),
    ("/v1/embeddings", {"model": "blue", "input": "x"}, 400, "writes text"),
    (LOAD, {"lora_name": "../blue"}, 400, "cannot be an adapter's name"),
    (LOAD, {"lora_name": "a/b", "lora_path": "{root}/blue"}, 400, "cannot be an adapter's name"),
    (LOAD, {"lora_name": "a\0b", "lora_path": "{root}/blue"}, 400, "cannot be an adapter's name"),
    (LOAD, {"lora_name": "base", "lora_path": "{root}/blue"}, 400, "the base's name"),
    (LOAD, {"lora_name": "x", "lora_path": "/etc"}, 404, "no folder"),
    (LOAD, {"lora_name": "x", "lora_path": "\0"}, 404, "no folder"),
    (LOAD, {"lora_name": "x", "lora_path": "/" + "x/" * 2000}, 404, "no folder"),
    (LOAD, load("x", "../secret"), 404, "no folder"),
    (LOAD, load("x", "others/out"), 404, "no folder"),
    (LOAD, load("x", "others/nothing"), 404, "no folder"),
    (LOAD, load("x", "blue/adapter_config.json"), 400, "is missing"),
    (LOAD, load("x", "others/linked"), 400, "a link that leaves"),
    (LOAD, load("x", "others/half"), 400, "not written to its end"),
    (LOAD, load("x", "others/bare"), 400, "is missing"),
    (LOAD, load("x", "others/listed"), 400, "no JSON object"),
    (LOAD, load("x", "others/pickled"), 400, "pickle"),
    (LOAD, load("x", "others/method"), 400, "IA3"),
    (LOAD, load("x", "others/nan"), 400, "lora_alpha"),
    (LOAD, load("x", "others/negative"), 400, "r"),
    (LOAD, load("x", "others/template"), 400, "chat_template.jinja"),
    (LOAD, load("x", "others/replicated"), 400, "replicated blocks"),
    (LOAD, load("x", "others/whole"), 400, "mlp (LlamaMLP)"),
    (LOAD, load("x", "others/parameters"), 400, "mlp.up_proj: what lora changes there is one for all tokens"),
    (LOAD, load("x", "others/high"), 400, "its rank is 12, and at most 8"),
    (UNLOAD, {"lora_name": "nobody"}, 404, "nobody"),
)


@pytest.mark.parametrize(
    ("path", "body", "status", "told"), HOSTILE, ids=[f"{own[0][1:]} {own[3]}" for own in HOSTILE]
)
def test_a_hostile_request_has_an_error_of_its_own(
    url: str, engine: Decoder, path: str, body: Any, status: int, told: str
) -> None:
    (root,) = engine._roots
    if "lora_path" in body:
        body = body | {"lora_path": body["lora_path"].format(root=root)}
    found, _, answer = call(f"{url}{path}", body)
    assert (found, set(answer)) == (status, {"error"}), answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert told in answer["error"]["message"]
    assert "x" not in {entry.name for entry in engine.adapters.entries()}
    assert call(f"{url}/health")[0] == 200


def test_and_the_engine_goes_on(url: str, engine: Decoder) -> None:
    for name in ("base", "blue"):
        assert call(f"{url}{P}", completion(model=name, max_tokens=3))[0] == 200
    texts = [
        call(f"{url}{P}", completion(temperature=temperature, max_tokens=8))[2]["choices"][0]["text"]
        for temperature in (0, 1e-300, 1e-40)
    ]
    assert len(set(texts)) == 1
    until(lambda: engine.leases == engine.blocks_held == 0)
    assert engine.stats.restarts_total == 0
    assert not lorica.adapters(engine.model)
