"""Serving many adapters over one base: the engine against the base alone, against merged copies and peers."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import peft
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import lorica
from lorica.serve import Decoder, Sampling

R = 8
REQUESTS, PROMPT, TOKENS = 32, 8, 8
PEERS = 5
"""Rounds of what takes many times as long."""
SLOTS = 32
LOADED = 256


def main() -> None:
    """Measure throughput in turns, then what one request waits for, and what one adapter costs."""
    options = harness.options(__doc__)
    options.warmup = min(options.warmup, 1)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        names = write_adapters(Path(folder), LOADED)
        bench = Bench(runner, Path(folder), names)
        try:
            compared = [bench.throughput(options)]
            publish(compared, [], options)  # a run that is stopped leaves this
            compared.append(bench.others(options))
            publish(compared, [bench.waits(options), bench.costs()], options)
        finally:
            bench.close()


def publish(
    compared: Sequence[harness.Comparison], more: Sequence[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Write down what was measured.

    Args:
        compared: the batch over numbers of adapters; then beside not sharing it, once that is measured.
        more: tables of waits and costs.
        options: of the command line.
    """
    captions = ("Time of the batch", f"And without sharing it; {PEERS} rounds")
    ratio = {name: each.ratio(name) for each in compared for name in each.seconds if name != "base"}
    harness.publish(
        "serve",
        title="Many adapters over one base, served",
        claim=(
            f"{REQUESTS} requests at once, each of {PROMPT} tokens and {TOKENS} more, over the base alone: "
            + ", ".join(f"{name} {value:.2f}×" for name, value in ratio.items())
            + "."
        ),
        tables=[
            *(harness.table([each], caption) for each, caption in zip(compared, captions, strict=False)),
            *more,
        ],
        data={"seconds": harness.seconds(compared), "more": [table["rows"] for table in more]},
        settings={"model": "Llama, 30 × 576, 135M, from its configuration", "r": R, "targets": "all-linear"},
        device=options.device,
        rounds=options.rounds,
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of serving the batch.

    Args:
        setting: what it is called.
        adapters: how many the requests are for; 0 for the base.
        slots: of the engine.
        zipf: whether the first adapters get most requests, in place of all alike.
        loaded: adapters in memory.
        apart: requests that go together; what comes first is finished first.
    """

    setting: str
    adapters: int = 0
    slots: int = SLOTS
    zipf: bool = False
    loaded: int = SLOTS
    apart: int = REQUESTS


ROWS = (
    Row("base"),
    Row("1 adapter", 1),
    Row("8 adapters", 8),
    Row("32 adapters", 32),
    Row("32 adapters, Zipf", 32, zipf=True),
    Row("32 adapters, 256 loaded", 32, loaded=LOADED),
    Row("32 adapters in 16 slots", 32, slots=SLOTS // 2),
)
APART = (
    Row("8 merged copies in turns", apart=REQUESTS // 8),
    Row("one by one", apart=1),
)


class Bench:
    """A model, its engines and its peers.

    Args:
        runner: of the engines' event loop.
        folder: of the adapters.
        names: of them.
    """

    def __init__(self, runner: asyncio.Runner, folder: Path, names: Sequence[str]) -> None:
        self.runner, self.folder, self.names = runner, folder, names
        self.model = model()
        self.engines: dict[tuple[int, int], Decoder] = {}
        draw = random.Random(0)
        self.prompts = [[draw.randrange(3, 49_000) for _ in range(PROMPT)] for _ in range(REQUESTS)]

    def engine(self, slots: int, loaded: int) -> Decoder:
        """One with so many slots, and adapters in memory; made once."""
        key = slots, loaded
        if key not in self.engines:
            engine = Decoder(self.model, adapters=self.folder, slots=slots, resident=LOADED, watch=0)
            self.runner.run(start(engine, self.names[:loaded]))
            self.engines[key] = engine
        return self.engines[key]

    def close(self) -> None:
        """Stop them."""
        for engine in self.engines.values():
            self.runner.run(engine.stop())

    def throughput(self, options: Any) -> harness.Comparison:
        """The batch for each number of adapters, in turns."""
        contestants = {row.setting: harness.Contestant(partial(self.serve, row)) for row in ROWS}
        setting = f"{REQUESTS} requests × ({PROMPT} + {TOKENS}) tokens"
        return harness.alternate(setting, contestants, reference="base", options=options)

    def others(self, options: Any) -> harness.Comparison:
        """The base's batch beside the same one by one, and by peers."""
        contestants = {row.setting: harness.Contestant(partial(self.serve, row)) for row in (ROWS[0], *APART)}
        theirs = by_peft(8)
        contestants["PEFT, 8 adapters in a static batch"] = harness.Contestant(
            partial(generate_static, theirs, self.prompts, [f"a{i % 8}" for i in range(REQUESTS)])
        )
        contestants["transformers, base"] = harness.Contestant(
            partial(generate_continuous, model(), self.prompts)
        )
        few = argparse.Namespace(**{**vars(options), "rounds": min(options.rounds, PEERS)})
        return harness.alternate("the same", contestants, reference="base", options=few)

    def serve(self, row: Row, _: object) -> None:
        """Answer the batch in one way."""
        engine = self.engine(row.slots, row.loaded)
        names = self._names(row)
        asked = list(zip(self.prompts, names, strict=True))
        for first in range(0, REQUESTS, row.apart):
            self.runner.run(answer_all(engine, asked[first : first + row.apart]))

    def _names(self, row: Row) -> list[str | None]:
        if not row.adapters:
            return [None] * REQUESTS
        if not row.zipf:
            return [self.names[i % row.adapters] for i in range(REQUESTS)]
        weights = [1 / (i + 1) for i in range(row.adapters)]
        drawn = random.Random(1).choices(range(row.adapters), weights, k=REQUESTS)
        return [self.names[i] for i in drawn]

    def waits(self, options: Any) -> dict[str, Any]:
        """What requests wait for while others come at half the rate that the engine can take."""
        rows = []
        for row in ROWS:
            engine = self.engine(row.slots, row.loaded)
            start = time.perf_counter()
            self.serve(row, None)
            spacing = 2 * (time.perf_counter() - start) / REQUESTS
            repeats = 2 if options.rounds >= harness.ROUNDS else 1
            asked = list(zip(self.prompts, self._names(row), strict=True)) * repeats
            times = self.runner.run(answer_spaced(engine, asked, spacing))
            first = [own[0] for own in times]
            between = [gap for own in times for gap in own[1:]]
            rows.append([row.setting, *map(_shown, (*_percentiles(first), *_percentiles(between)))])
        columns = ["", "first token, median", "95 %", "next token, median", "95 %"]
        return {"caption": "At half the rate of the first table", "columns": columns, "rows": rows}

    def costs(self) -> dict[str, Any]:
        """What an adapter costs."""
        engine = self.engine(SLOTS, SLOTS)
        cold = [self.runner.run(first_token(engine, self.prompts[0], name)) for name in self.names[-8:]]
        warm = [self.runner.run(first_token(engine, self.prompts[0], name)) for name in self.names[-8:]]
        fitted = engine.slots.fit(lorica.read(self.folder / self.names[0]))
        spare = Decoder(self.model, slots=8).slots
        mounts = []
        for _ in range(8):
            start = time.perf_counter()
            spare.mount(fitted)
            mounts.append(time.perf_counter() - start)
        spare.close()
        rows = [
            ["load to first token", _shown(statistics.median(cold))],
            ["the same of a mounted adapter", _shown(statistics.median(warm))],
            ["copy into a slot", _shown(statistics.median(mounts[-3:]))],
            ["memory of an adapter", f"{fitted.nbytes / 2**20:.1f} MiB"],
            ["memory of a slot", f"{engine.slots.nbytes / 2**20 / SLOTS:.1f} MiB"],
        ]
        return {"caption": "One adapter", "columns": ["", ""], "rows": rows}


def model() -> Any:
    """A Llama of 135M parameters in SmolLM's shape, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def write_adapters(folder: Path, count: int) -> list[str]:
    """Folders of adapters that differ in their scale; their weights are one file, linked."""
    base = model()
    lorica.adapt(base, lorica.LoraConfig(r=R, target_modules="all-linear", init_lora_weights=False), seed=0)
    value, names = lorica.extract(base), [f"a{i}" for i in range(count)]
    weights = lorica.write(value, folder / names[0]) / "adapter_model.safetensors"
    for i, name in enumerate(names[1:]):
        (folder / name).mkdir()
        os.link(weights, folder / name / weights.name)
        settings = json.dumps(value.lora.replace(lora_alpha=R + 1 + i).to_dict())
        (folder / name / "adapter_config.json").write_text(settings, encoding="utf-8")
    return names


async def start(engine: Decoder, names: Sequence[str]) -> None:
    """Start an engine, and read adapters into memory."""
    await engine.start()
    for name in names:
        await engine.adapters.load(name)


Asked = tuple[list[int], str | None]


def sampling() -> Sampling:
    """Of every request."""
    return Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)


async def answer_all(engine: Decoder, asked: Sequence[Asked]) -> None:
    """Ask all at once, and wait for all."""
    await asyncio.gather(*(times_of(engine, own) for own in asked))


async def answer_spaced(engine: Decoder, asked: Sequence[Asked], spacing: float) -> list[list[float]]:
    """Ask one after the other, at random times that are `spacing` apart on average."""
    draw, tasks = random.Random(0), []
    for own in asked:
        tasks.append(asyncio.create_task(times_of(engine, own)))
        await asyncio.sleep(draw.expovariate(1 / spacing))
    return list(await asyncio.gather(*tasks))


async def times_of(engine: Decoder, asked: Asked) -> list[float]:
    """Seconds until the first token, and between two of the others."""
    before, times = time.perf_counter(), []
    async for step in engine.admit(*asked, sampling()):
        now = time.perf_counter()
        times += [(now - before) / len(step.tokens)] * len(step.tokens)
        before = now
    return times


async def first_token(engine: Decoder, prompt: list[int], name: str) -> float:
    """Seconds until the first token, with nobody else there."""
    answer = engine.admit(prompt, name, sampling())
    start = time.perf_counter()
    await anext(answer)
    found = time.perf_counter() - start
    await answer.aclose()
    return found


def by_peft(count: int) -> Any:
    """PEFT's model with adapters of the same shape."""
    config = peft.LoraConfig(r=R, target_modules="all-linear", init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model(), config, adapter_name="a0")
    for i in range(1, count):
        adapted.add_adapter(f"a{i}", config)
    return adapted.eval()


def generate_static(theirs: Any, prompts: Sequence[list[int]], names: Sequence[str], _: object) -> None:
    """PEFT's way: a batch that begins and ends together, a name for each row."""
    ids = torch.tensor(prompts)
    theirs.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=list(names),
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=0,
    )


def generate_continuous(base: Any, prompts: Sequence[list[int]], _: object) -> None:
    """Continuous batching as transformers has it, which knows no adapters; sized as ours."""
    sizes = ContinuousBatchingConfig(
        page_size=16, num_blocks=1024, max_batch_tokens=256, max_requests_per_batch=REQUESTS
    )
    base.generate_batch(
        list(prompts),
        generation_config=GenerationConfig(max_new_tokens=TOKENS, eos_token_id=-1, do_sample=False),
        continuous_batching_config=sizes,
        progress_bar=False,
    )


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=20)
    return statistics.median(values), cuts[-1]


def _shown(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.1f} ms"


if __name__ == "__main__":
    main()
