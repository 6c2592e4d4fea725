"""`lorica serve` and `lorica chat`, as a user would start them, and what they find in a folder."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import encoders
import endpoints
import torch
from train import tiny
from transformers import LlamaConfig, LlamaForCausalLM
from waiting import PATIENCE

import lorica
from lorica.cli import main
from lorica.errors import ConfigError
from lorica.serve.encoder import EncoderEngine
from lorica.serve.encoder.rows import rows_of
from lorica.serve.http import Keys
from lorica.serve.http.running import check_open, listen
from lorica.serve.opening import look_at, open_engine
from lorica.train import predict


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small decoder, ``model``, and an adapter for it, ``adapters/blue``."""
    folder = tmp_path_factory.mktemp("writer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    endpoints.tokenizer().save_pretrained(folder / "model")
    lorica.adapt(model, lorica.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    lorica.save(model, folder / "adapters" / "blue")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lorica train` leaves."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data")
    recipe = tiny.recipe(folder / "model", folder / "data", folder / "topics", max_steps=2)
    recipe.save(folder / "recipe.yaml")
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "topics"


@contextlib.contextmanager
def asked(port: int, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {"Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
    with contextlib.closing(connection), connection.getresponse() as answer:
        yield answer


def test_a_server_told_to_stop_finishes_what_runs(writer: Path) -> None:
    command = [sys.executable, "-m", "lorica", "serve", str(writer / "model"), "--port", "0"]
    with subprocess.Popen(
        [*command, "--adapters", str(writer / "adapters")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            told = process.stdout.readline()
            found = re.match(r"serving model at http://127\.0\.0\.1:(\d+): a page at /", told)
            assert found, told
            port = int(found[1])
            with asked(port, "/v1/models") as answer:
                assert [each["id"] for each in json.load(answer)["data"]] == ["model", "blue"]
            body = {"model": "blue", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
            with asked(port, "/v1/completions", body) as answer:
                first = answer.readline()
                process.send_signal(signal.SIGTERM)
                events = [first, *answer.read().splitlines()]
            chunks = [json.loads(event[6:]) for event in events if event.startswith(b"data: {")]
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
            assert events[-2] == b"data: [DONE]"
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_a_conversation(
    writer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (
        "hello\n/adapter blue\nhello\n/compare base blue\nhello\n/adapter blau\n/nonsense\n\n/quit\nnever\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    argv = ["chat", str(writer / "model"), "--adapters", str(writer / "adapters")]
    assert main([*argv, "--max-tokens", "5", "--temperature", "0"]) == 0
    told = capsys.readouterr()
    assert len(told.out.strip().splitlines()) >= 4
    assert "base: " in told.out
    assert "blue: " in told.out
    assert "did you mean 'blue'" in told.err
    assert "'/nonsense' is no command" in told.err


def test_a_run_is_served_by_its_name(run: Path, encoder: tuple[Path, Any], writer: Path) -> None:
    source = look_at(str(run))
    assert (source.kind, source.default, source.tokenizer) == ("encoder", "topics", str(run))
    assert source.model == "model"
    plain = look_at(str(writer / "model"))
    assert (plain.kind, plain.default, plain.model) == ("decoder", None, "model")
    adapter = look_at(str(encoder[0] / "adapters" / "tags"))
    assert (adapter.kind, adapter.default) == ("encoder", "tags")
    assert look_at(str(encoder[0] / "model")).kind == "encoder"


def test_a_run_answers_as_it_predicts(run: Path) -> None:
    async def told() -> list[dict[str, Any]]:
        engine = open_engine(look_at(str(run)))
        assert isinstance(engine, EncoderEngine)
        await engine.start()
        async with engine.using("topics") as using:
            rows = rows_of(engine.tokenizer, encoders.TEXTS)
            assert using.head is not None
            found = [using.head.told(o, r) for o, r in zip(await using.outputs(rows), rows, strict=True)]
        await engine.stop()
        return found

    for one, other in zip(asyncio.run(told()), predict(run, list(encoders.TEXTS)), strict=True):
        assert one["label"] == other["label"]
        assert one["probs"] == pytest.approx(list(other["probabilities"].values()), abs=1e-6)
        assert one["labels"] == list(other["probabilities"])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["serve", "nowhere", "--host", "0.0.0.0"], "anyone there could use the model"),
        (["serve", "nowhere", "--port", "99999"], "cannot listen"),
        (["serve", ".", "--port", "0"], "neither a model nor an adapter"),
        (["serve", "{model}", "--port", "0", "--slots", "0"], "--slots must be at least 1"),
        (["serve", "{model}", "--port", "0", "--max-wait", "0"], "--max-wait must be above 0"),
        (["serve", "{model}", "--port", "0", "--adapters", "nowhere"], "no folder nowhere"),
        (["serve", "{model}", "--port", "0", "--api-key-file", "nowhere"], "cannot read the keys"),
        (["serve", "{model}", "--port", "0", "--train", "{new}"], "reads texts and writes none; --train"),
        (["serve", "{model}", "--port", "0", "--train", "{new}", "--max-wait", "0"], "--max-wait must be"),
        (["chat", "{model}"], "reads texts and writes none"),
    ],
)
def test_what_is_refused(
    argv: list[str], told: str, encoder: tuple[Path, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    places = {"model": encoder[0] / "model", "new": tmp_path / "new"}
    here = [word.format(**places) if word != "." else str(tmp_path) for word in argv]
    assert main(here) == 1
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_who_may_ask() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_open(host, Keys(), anonymous=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="--anonymous"):
            check_open(host, Keys(), anonymous=False)
        check_open(host, Keys(), anonymous=True)
    taken = listen("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="choose another"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()
