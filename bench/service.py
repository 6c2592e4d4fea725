"""Many tenants on one service, against a process each and against one after another: time and memory.

Each tenant trains (a call of forward_backward on a few rows, and a step) and samples. The service does all of
them at once; the others are plain loops: lorica.adapt, torch's AdamW, and transformers' generate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from typing import Any

import harness
import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica.service import Client, Datum

R, VOCABULARY = 16, 8192
ROWS, TOKENS = 4, 32
SAMPLES, PROMPT, DRAWN = 4, 8, 16
WORKS = ("training", "sampling", "both")
TENANTS = (1, 4, 16)
ADAPTED: dict[str, Any] = {"r": R, "lora_alpha": 32, "target_modules": "all-linear"}


def main() -> None:
    """Measure every number of tenants, and every work."""
    options = harness.options(__doc__)
    rates, memory = [], []
    for count in TENANTS:
        ways = {name: way(count) for name, way in WAYS.items()}
        for work in WORKS:
            contestants = {name: harness.Contestant(partial(_do, way, work)) for name, way in ways.items()}
            setting = f"{count} tenant{'s' * (count > 1)}, {work}"
            rates.append(harness.alternate(setting, contestants, reference="service", options=options))
        for way in ways.values():
            way.close()
        held = [harness.apart(memory_of, name, count) for name in WAYS]
        memory.append([str(count), *(f"{size / 2**20:,.0f} MiB" for size in held)])
    worst = min(rate.ratio("a process each") for rate in rates if not rate.setting.startswith("1 "))
    harness.publish(
        "service",
        title="Training as a service: many tenants on one base",
        claim=(
            f"From 4 tenants on a process each takes {worst:.2f}× the service's time or more; in the service "
            "each tenant's results are those that it has alone, bit for bit."
        ),
        tables=[
            harness.table(rates, "Time of a step of every tenant, of its samples, and of both"),
            {
                "caption": "Memory",
                "columns": ["tenants", "service", "a process each", "in turn"],
                "rows": memory,
            },
        ],
        data={"seconds": harness.seconds(rates), "memory": memory},
        settings={
            "model": "Llama, 8 × 512, from its configuration",
            "r": R,
            "targets": "all-linear",
            "rows and tokens of a step": f"{ROWS} × {TOKENS}",
            "samples": f"{SAMPLES} × {DRAWN} tokens behind {PROMPT}",
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


def rows(seed: int) -> Tensor:
    """What a tenant learns in a step."""
    return torch.randint(0, VOCABULARY, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(seed))


class Way:
    """A way to serve all tenants."""

    def do(self, work: str) -> None:
        """One step of each tenant, its samples, or both."""
        raise NotImplementedError

    def close(self) -> None:
        """End it."""


class Together(Way):
    """The service."""

    def __init__(self, count: int) -> None:
        """Begin its runs."""
        self._client, self._numbers = Client(model(), lanes=256), itertools.count()
        self._runs = [self._client.create(R, seed=i, train_unembed=False) for i in range(count)]

    def do(self, work: str) -> None:  # noqa: D102
        number, futures = next(self._numbers), []
        for i, run in enumerate(self._runs):
            if work != "sampling":
                data = [Datum.of(row[:-1], target_tokens=row[1:]) for row in rows(number + 1000 * i)]
                run.forward_backward(data, "cross_entropy")
                futures.append(run.optim_step(learning_rate=1e-4))
            if work != "training":
                futures.append(run.sample(range(PROMPT), max_tokens=DRAWN, num_samples=SAMPLES, seed=number))
        for future in futures:
            future.result()

    def close(self) -> None:  # noqa: D102
        self._client.close()


class Tenant:
    """One tenant's plain loop."""

    def __init__(self, base: LlamaForCausalLM, seed: int) -> None:
        """Adapt the base."""
        self._model, self._name, self._seed = base, f"t{seed}", 1000 * seed
        lorica.adapt(base, lorica.LoraConfig(**ADAPTED), self._name, seed=seed)
        trained = [p for name, p in base.named_parameters() if f".{self._name}." in name]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def do(self, work: str) -> None:
        """As `Way.do`, for this one."""
        with lorica.active(self._model, self._name):
            if work != "sampling":
                self._seed += 1
                data = rows(self._seed)
                logits = self._model(input_ids=data[:, :-1]).logits
                F.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten(), reduction="sum").backward()
                self._optimizer.step()
                self._optimizer.zero_grad()
            if work != "training":
                prompt = torch.arange(PROMPT)[None]
                draw: dict[str, Any] = {
                    "do_sample": True,
                    "max_new_tokens": DRAWN,
                    "num_return_sequences": SAMPLES,
                }
                writes: Any = self._model
                writes.generate(prompt, attention_mask=torch.ones_like(prompt), **draw)


class InTurn(Way):
    """One tenant after another on one base."""

    def __init__(self, count: int) -> None:
        """Adapt the base for each."""
        base = model()
        self._tenants = [Tenant(base, i) for i in range(count)]

    def do(self, work: str) -> None:  # noqa: D102
        for tenant in self._tenants:
            tenant.do(work)


class Apart(Way):
    """A process for each tenant, all at once."""

    def __init__(self, count: int) -> None:
        """Start them."""
        context = get_context("spawn")
        threads = max(1, torch.get_num_threads() // count)
        self._pipes, self._processes = [], []
        for i in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, i, threads), daemon=True)
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

    def close(self) -> None:  # noqa: D102
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join()


def _serve(pipe: Any, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    tenant = Tenant(model(), seed)
    pipe.send(None)
    while (work := pipe.recv()) is not None:
        tenant.do(work)
        pipe.send(None)


WAYS: dict[str, Callable[[int], Way]] = {"service": Together, "a process each": Apart, "in turn": InTurn}


def memory_of(name: str, count: int) -> int:
    """Bytes that a way holds after a turn, with its processes; what they share counts once."""
    way = WAYS[name](count)
    way.do("both")
    process = psutil.Process()
    held = sum(each.memory_full_info().pss for each in (process, *process.children(recursive=True)))
    way.close()
    return held


if __name__ == "__main__":
    main()
