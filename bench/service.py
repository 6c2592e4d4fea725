"""Many tenants on one service, against a process each and against one after another: time and memory.

Each tenant trains (a call of forward_backward, and a step) and samples. The service does all of them at once,
with as many engines as `lorica serve --train` has; the others are plain loops: lorica.adapt, torch's AdamW,
and transformers' generate. Each way has a process of its own, or several. Calls are small (one row of 16
tokens) or large (64 tokens): what a product with a weight gains by more rows, it gains up to about 64.

SkyRL tx, another server of the protocol, takes part as `--skyrl PYTHON`, the interpreter of an environment of
its own: `python -m venv skyrl; skyrl/bin/pip install "skyrl-tx[tinker]==0.3.0"`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import harness
import psutil
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lorica
from lorica.service import Client, Datum
from lorica.service.engine.several.engines import usual

R, VOCABULARY = 16, 8192
SMALL, LARGE = (1, 16), (2, 32)
SAMPLES, PROMPT, DRAWN = 4, 8, 8
WORKS = ("training, small calls", "training, large calls", "sampling", "training, small calls, and sampling")
TENANTS = (16, 4, 1)  # the largest first: a run takes half an hour, and may be cut short
ADAPTED: dict[str, Any] = {"r": R, "lora_alpha": 32, "target_modules": "all-linear"}


def main() -> None:
    """Measure every number of tenants, and every work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--skyrl", help="the Python of an environment with SkyRL tx (default: it takes no part)"
    )
    options = harness.options(__doc__, parser=parser)
    options.warmup = min(options.warmup, 1)
    peers = {} if options.skyrl is None else {SKYRL: partial(SkyRL, options.skyrl)}
    rates, memory, versions = [], [], "it took no part: --skyrl PYTHON"
    for count in TENANTS:
        ways: dict[str, Way] = {name: way(count) for name, way in {**WAYS, **peers}.items()}
        versions = next((way.versions for way in ways.values() if isinstance(way, SkyRL)), versions)
        for work in WORKS:
            contestants = {name: harness.Contestant(partial(_do, way, work)) for name, way in ways.items()}
            setting = f"{count} tenant{'s' * (count > 1)}, {work}"
            rates.append(harness.alternate(setting, contestants, reference="service", options=options))
        held = {name: way.held() for name, way in ways.items()}
        for way in ways.values():
            way.close()
        cells = [f"{size / 2**20:,.0f} MiB ({size / held['service']:.2f}×)" for size in held.values()]
        memory.append([str(count), *cells])
        print(f"{count} tenants, memory: {', '.join(cells)}", flush=True)
        write(options, rates, memory, [*WAYS, *peers], versions)


def write(options: Any, rates: list[Any], memory: list[list[str]], ways: list[str], versions: str) -> None:
    """Publish what was measured so far."""
    most = [rate for rate in rates if rate.setting.startswith(f"{TENANTS[0]} ")]
    told = ", ".join(
        f"{rate.ratio('a process each'):.1f}× ({rate.setting.partition(', ')[2]})" for rate in most
    )
    harness.publish(
        "service",
        title="Training as a service: many tenants on one base",
        claim=(
            f"For {TENANTS[0]} tenants a process each takes {told} the service's time. In the service each "
            "tenant's results are those that it has alone, bit for bit."
        ),
        tables=[
            harness.table(rates, "Time of a step of every tenant, of its samples, and of both"),
            {
                "caption": "Memory",
                "columns": ["tenants", *ways],
                "rows": memory,
            },
        ],
        data={"seconds": harness.seconds(rates), "memory": memory},
        settings={
            "model": "Llama, 8 × 512, from its configuration",
            "r": R,
            "targets": "all-linear",
            "rows and tokens of a call": " or ".join(f"{rows} × {tokens}" for rows, tokens in (SMALL, LARGE)),
            "samples": f"{SAMPLES} × {DRAWN} tokens behind {PROMPT}",
            SKYRL: versions,
        },
        device=options.device,
        rounds=options.rounds,
    )


def _do(way: Way, work: str, _: Any) -> None:
    way.do(work)


def model() -> LlamaForCausalLM:
    """The base."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, **sizes, **heads, **ends)
    ).eval()


def rows(seed: int, work: str) -> Tensor:
    """What a tenant learns in a step."""
    count, tokens = LARGE if "large" in work else SMALL
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, tokens + 1), generator=random)


class Way:
    """A way to serve all tenants."""

    def do(self, work: str) -> None:
        """One step of each tenant, its samples, or both."""
        raise NotImplementedError

    def held(self) -> int:
        """Bytes that its processes hold; what they share with others counts by its part."""
        raise NotImplementedError

    def close(self) -> None:
        """End it."""


class Worker(Protocol):
    """What a process does its work by."""

    def do(self, work: str) -> None:
        """As `Way.do`, for its tenants."""


class Processes(Way):
    """Processes that work at once.

    Args:
        makes: for each of them, the function that makes its worker.
        threads: of torch, in each.
    """

    def __init__(self, makes: Sequence[Callable[[], Worker]], threads: int) -> None:
        """Start them."""
        context = get_context("spawn")
        self._pipes, self._processes = [], []
        for make in makes:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, threads), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def do(self, work: str) -> None:  # noqa: D102
        for pipe in self._pipes:
            pipe.send(work)
        for pipe in self._pipes:
            pipe.recv()

    def held(self) -> int:  # noqa: D102
        ours = [psutil.Process(each.pid) for each in self._processes]
        ours += [engine for each in ours for engine in each.children(recursive=True)]
        return sum(each.memory_full_info().pss for each in ours)

    def close(self) -> None:  # noqa: D102
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join()


class Together:
    """The service."""

    def __init__(self, count: int) -> None:
        """Begin its runs."""
        base = model()
        self._client = Client(base, engines=usual(base.device))
        self._numbers = itertools.count()
        self._runs = [self._client.create(R, seed=i, train_unembed=False) for i in range(count)]

    def do(self, work: str) -> None:
        """As `Way.do`."""
        number, futures = next(self._numbers), []
        for i, run in enumerate(self._runs):
            if "training" in work:
                data = [Datum.of(row[:-1], target_tokens=row[1:]) for row in rows(number + 1000 * i, work)]
                run.forward_backward(data, "cross_entropy")
                futures.append(run.optim_step(learning_rate=1e-4))
            if "sampling" in work:
                futures.append(run.sample(range(PROMPT), max_tokens=DRAWN, num_samples=SAMPLES, seed=number))
        for future in futures:
            future.result()


class Tenant:
    """One tenant's plain loop."""

    def __init__(self, seed: int, base: LlamaForCausalLM | None = None) -> None:
        """Adapt the base; None makes one."""
        base = model() if base is None else base
        self._model, self._name, self._seed = base, f"t{seed}", 1000 * seed
        lorica.adapt(base, lorica.LoraConfig(**ADAPTED), self._name, seed=seed)
        trained = [p for name, p in base.named_parameters() if f".{self._name}." in name]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def do(self, work: str) -> None:
        """As `Way.do`, for this one."""
        with lorica.active(self._model, self._name):
            if "training" in work:
                self._seed += 1
                data = rows(self._seed, work)
                logits = self._model(input_ids=data[:, :-1]).logits
                F.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten(), reduction="sum").backward()
                self._optimizer.step()
                self._optimizer.zero_grad()
            if "sampling" in work:
                prompt = torch.arange(PROMPT)[None]
                draw: dict[str, Any] = {
                    "do_sample": True,
                    "max_new_tokens": DRAWN,
                    "num_return_sequences": SAMPLES,
                }
                writes: Any = self._model
                writes.generate(prompt, attention_mask=torch.ones_like(prompt), **draw)


class InTurn:
    """One tenant after another on one base."""

    def __init__(self, count: int) -> None:
        """Adapt the base for each."""
        base = model()
        self._tenants = [Tenant(i, base) for i in range(count)]

    def do(self, work: str) -> None:
        """As `Way.do`."""
        for tenant in self._tenants:
            tenant.do(work)


class SkyRL(Way):
    """SkyRL tx's JAX backend, without HTTP: all tenants in one call, as its engine joins them.

    Args:
        python: of its environment.
        count: of tenants.
    """

    def __init__(self, python: str, count: int) -> None:
        """Save the model where it reads it, and start it."""
        self._count, self._numbers = count, itertools.count()
        self._folder = tempfile.TemporaryDirectory()
        model().save_pretrained(self._folder.name)
        words = {f"w{i}": i for i in range(VOCABULARY)}
        core = Tokenizer(WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(self._folder.name)
        # It reads what transformers 4 wrote.
        earlier = {
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
            "config.json": {"rope_theta": 10000.0, "torch_dtype": "float32"},
        }
        for name, values in earlier.items():
            file = Path(self._folder.name, name)
            file.write_text(json.dumps(json.loads(file.read_text()) | values))
        asked = {"model": self._folder.name, "tenants": count, "rank": R}
        asked |= {"samples": SAMPLES, "prompt": PROMPT, "drawn": DRAWN}
        command = [python, str(Path(__file__).with_name("peers") / "skyrl_tx.py"), json.dumps(asked)]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
            "JAX_PLATFORMS": "cpu"
        }
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, **pipes)
        self.versions = ", ".join(f"{name} {version}" for name, version in self._answer().items())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(
                f"SkyRL tx ended with {self._process.wait()}; run {self._process.args} by hand to see why"
            )
        return json.loads(line)

    def do(self, work: str) -> None:  # noqa: D102
        number = next(self._numbers)
        learned = "training" in work
        each = [rows(number + 1000 * i, work).tolist() for i in range(self._count)] if learned else []
        assert self._process.stdin is not None
        print(
            json.dumps({"rows": each, "sampling": "sampling" in work}), file=self._process.stdin, flush=True
        )
        self._answer()

    def held(self) -> int:  # noqa: D102
        return psutil.Process(self._process.pid).memory_full_info().pss

    def close(self) -> None:  # noqa: D102
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()


def _serve(pipe: Any, make: Callable[[], Worker], threads: int) -> None:
    torch.set_num_threads(threads)
    worker = make()
    pipe.send(None)
    while (work := pipe.recv()) is not None:
        worker.do(work)
        pipe.send(None)


def _one(worker: Callable[[int], Worker], count: int) -> Way:
    return Processes([partial(worker, count)], torch.get_num_threads())


def _apart(count: int) -> Way:
    return Processes([partial(Tenant, i) for i in range(count)], max(1, torch.get_num_threads() // count))


SKYRL = "SkyRL tx"
WAYS: dict[str, Callable[[int], Way]] = {
    "service": partial(_one, Together),
    "a process each": _apart,
    "in turn": partial(_one, InTurn),
}


if __name__ == "__main__":
    main()
