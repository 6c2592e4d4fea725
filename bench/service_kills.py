"""SIGKILL of the training service at random moments: its client goes on, and ends with the same bits.

The server runs in a child of a process that has everything loaded; whenever the child is gone, the next one
begins in the same folder. The client is the official SDK, which trains, saves and samples, and knows nothing
of this. Its weights at the end are compared with those of the same calls without a server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica.service import Base, Client, Datum, Service
from lorica.service.http import run as run_server

KILLS, NAME, LENGTH, ROWS, RANK = 20, "tiny", 24, 3, 4
ADAM: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "grad_clip_norm": 10.0}


def main() -> None:
    """Kill as often as asked, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=KILLS, help=f"how many (default {KILLS})")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve[0]), int(options.serve[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = killed(Path(folder), options.kills, options.seed)
    print(f"{result['kills']} kills over {result['steps']} steps; same bits: {result['same']}")
    if options.kills < KILLS or not result["same"]:
        sys.exit(0 if result["same"] else 1)
    downtimes = sorted(result["seconds"])
    harness.publish(
        "service_kills",
        title="A training service that is killed",
        claim=(
            f"SIGKILL at {result['kills']} random moments of {result['steps']} steps: the SDK's client, "
            "unmodified, went on each time, and ended with the weights of the same calls without a server, "
            "bit for bit."
        ),
        tables=[
            {
                "caption": "Seconds from a kill to the next answer of a server that was loaded already",
                "columns": ["least", "median", "most"],
                "rows": [[f"{downtimes[i]:.2f}" for i in (0, len(downtimes) // 2, -1)]],
            }
        ],
        data=result,
        settings={"model": "Llama, 2 × 32", "rows a step": ROWS, "tokens a row": LENGTH, "r": RANK},
        device="cpu",
    )


def model() -> nn.Module:
    """Llama, two narrow layers."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def tokens(step: int, row: int) -> list[int]:
    """What a row of a step holds."""
    return [3 + (step * 7 + row * 5 + i * i) % 90 for i in range(LENGTH + 1)]


def serve(folder: Path, port: int) -> None:
    """Fork a server, and another one when it is gone."""
    torch.set_num_threads(1)
    base = model()
    while True:
        child = os.fork()
        if child == 0:
            service = Service(Base(base, NAME), folder / "state", snapshot=0.5, engines=2)
            run_server(service, port=port)
            os._exit(0)
        (folder / "pid.new").write_text(str(child))
        (folder / "pid.new").replace(folder / "pid")
        os.waitpid(child, 0)


def killed(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Train by the SDK over the kills, and alone; how many steps, and whether the weights are the same."""
    import tinker

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(folder), str(port)])
    killer = Killer(folder, port, kills, seed)
    try:
        killer.wait_for_server()
        client = tinker.ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key="tml-any")
        killer.start()
        train, steps = client.create_lora_training_client(base_model=NAME, rank=RANK, seed=1).result(), 0
        while killer.is_alive() or steps < 20:
            data = [
                tinker.types.Datum(
                    model_input=tinker.types.ModelInput.from_ints(row[:-1]),
                    loss_fn_inputs={"target_tokens": torch.tensor(row[1:])},  # type: ignore[dict-item]
                )
                for row in (tokens(steps, i) for i in range(ROWS))
            ]
            train.forward_backward(data, "cross_entropy")
            step = train.optim_step(tinker.types.AdamParams(**ADAM))
            steps += 1
            if steps % 10 == 0:
                step.result()
            if steps % 40 == 0:
                path = train.save_weights_for_sampler(f"at{steps}").result().path
                sampler = client.create_sampling_client(model_path=path).result()
                params = tinker.types.SamplingParams(max_tokens=4)
                sampler.sample(tinker.types.ModelInput.from_ints([5]), 2, params).result()
        train.save_state("end").result()
        ours = read(folder / "state", "end")
        with contextlib.suppress(Exception):
            client.close("success").result(timeout=10)
    finally:
        server.kill()
        server.wait()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    same = all(torch.equal(a, b) for a, b in zip(ours, alone(steps), strict=True))
    return {"kills": len(killer.seconds), "steps": steps, "same": same, "seconds": killer.seconds}


def alone(steps: int) -> list[Tensor]:
    """The same calls without a server."""
    with Client(model(), name=NAME) as client:
        run = client.create(RANK, seed=1)
        for step in range(steps):
            rows = [tokens(step, i) for i in range(ROWS)]
            run.forward_backward([Datum.of(r[:-1], target_tokens=r[1:]) for r in rows], "cross_entropy")
            run.optim_step(**ADAM)
        return flat(run.adapter().result())


def read(state: Path, name: str) -> list[Tensor]:
    """A checkpoint in the service's folder."""
    (folder,) = state.glob(f"runs/*/weights/{name}")
    return flat(lorica.read(folder))


def flat(adapter: lorica.Adapter) -> list[Tensor]:
    """An adapter's tensors in the order of their paths."""
    return [tensor for _, f in sorted(adapter.factors.items()) for tensor in (f.A, f.B)]


class Killer(threading.Thread):
    """Kills the server at random moments.

    Attributes:
        seconds: from each kill to the next answer.
    """

    def __init__(self, folder: Path, port: int, kills: int, seed: int) -> None:
        """Wait for `start`."""
        super().__init__(daemon=True)
        self.folder, self.port, self.kills = folder, port, kills
        self.random, self.seconds = random.Random(seed), []

    def run(self) -> None:
        """Kill, wait until the next one answers, and again."""
        for _ in range(self.kills):
            time.sleep(self.random.uniform(0.0, 2.0))
            pid, begun = int((self.folder / "pid").read_text()), time.monotonic()
            os.kill(pid, signal.SIGKILL)
            while int((self.folder / "pid").read_text()) == pid:
                time.sleep(0.01)
            self.wait_for_server()
            self.seconds.append(round(time.monotonic() - begun, 3))
            print(json.dumps({"kill": len(self.seconds), "seconds": self.seconds[-1]}), flush=True)

    def wait_for_server(self) -> None:
        """Until somebody listens."""
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)


if __name__ == "__main__":
    main()
