"""``lorica serve --train``: the training protocol beside OpenAI's endpoints, over one base."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from service.causal_models import llama
from train import tiny
from waiting import until

from lorica.cli import main

for _module in ("tinker", "uvicorn", "prometheus_client"):
    pytest.importorskip(_module, reason="not installed: pip install 'lorica[service]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with its tokenizer."""
    where = tmp_path_factory.mktemp("served")
    tokenizer = tiny.tokenizer()
    model: Any = llama(vocab_size=len(tokenizer))
    model.save_pretrained(where / "base")
    tokenizer.save_pretrained(where / "base")
    return where


@pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
def test_what_is_trained_is_served(folder: Path) -> None:
    import tinker

    types = tinker.types
    words = ["serve", str(folder / "base"), "--port", "0", "--train", str(folder / "state"), "--engines", "2"]
    command = [sys.executable, "-m", "lorica", *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        with process.stdout as told:
            found = re.search(r"http://\S+:\d+", told.readline())
        assert found is not None
        address = found[0]
        client = tinker.ServiceClient(base_url=address, api_key="tml-any")
        run = client.create_lora_training_client(base_model="base", rank=2, seed=0).result()
        tokens = [5, 6, 7, 8, 5, 6, 7, 8]
        inputs: Any = {"target_tokens": torch.tensor(tokens[1:])}
        datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
        for _ in range(12):
            run.forward_backward([datum], "cross_entropy")
            run.optim_step(types.AdamParams(learning_rate=3e-2))
        path = run.save_weights_for_sampler("taught").result().path
        sampler = client.create_sampling_client(model_path=path).result()
        greedy = types.SamplingParams(max_tokens=4, temperature=0, stop=[])
        drawn = sampler.sample(types.ModelInput.from_ints(tokens[:4]), 1, greedy).result().sequences[0]
        base = client.create_sampling_client(base_model="base").result()
        before = base.sample(types.ModelInput.from_ints(tokens[:4]), 1, greedy).result().sequences[0]
        assert before.logprobs != drawn.logprobs
        # The folder is watched.
        name = until(
            lambda: next((each for each in models(address) if each.endswith(".taught")), None),
            "it",
            every=0.2,
        )
        body = {
            "model": name,
            "prompt": tokens[:4],
            "max_tokens": 4,
            "temperature": 0,
            "logprobs": 0,
            "ignore_eos": True,
        }
        answer = ask(f"{address}/v1/completions", body)["choices"][0]
        theirs = torch.tensor(answer["logprobs"]["token_logprobs"])
        torch.testing.assert_close(theirs, torch.tensor(drawn.logprobs), atol=1e-4, rtol=0)
        client.close("success").result()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def models(address: str) -> list[str]:
    return [each["id"] for each in ask(f"{address}/v1/models")["data"]]


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "application/json"})
    ) as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--train-keys", "nowhere"], "nobody does without --train"),
        (["--engines", "2"], "nothing does without --train"),
        (["--train", "{state}", "--engines", "0"], "--engines must be at least 1"),
        (["--train", "{state}", "--train-keys", "nowhere"], "cannot read the keys"),
        (["--train", "{state}", "--host", "0.0.0.0", "--api-key-file", "{keys}"], "--train-keys FILE"),
    ],
)
def test_what_is_refused(
    more: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "keys").write_text("sk-operator-key name=ops admin\n")
    words = [word.format(state=folder / "other", keys=folder / "keys") for word in more]
    assert main(["serve", str(folder / "base"), "--port", "0", *words]) == 1
    assert told in capsys.readouterr().err
