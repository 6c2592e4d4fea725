"""Serving an encoder: texts of eight adapters at once against the base alone, and one text at a time."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import harness
import torch
from models import QUERY_VALUE, minilm

import lorica
from lorica.serve import EncoderEngine
from lorica.serve.encoder import Base
from lorica.serve.encoder.rows import Row
from lorica.train import embedded

R, TEXTS, ADAPTERS = 8, 128, 8


def main() -> None:
    """Ask for the vectors of the same texts in every way."""
    options = harness.options(__doc__)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        names = write_adapters(Path(folder))
        engine = EncoderEngine(Base.open(str(embedded.model_directory())), (folder,), watch=0)
        runner.run(engine.start())
        rows = texts()
        base: list[str | None] = [None] * TEXTS
        mixed: list[str | None] = [names[i % ADAPTERS] for i in range(TEXTS)]
        try:
            comparison = harness.alternate(
                f"{TEXTS} texts of 4 to 110 tokens",
                {
                    "base": harness.Contestant(partial(together, runner, engine, rows, base)),
                    f"{ADAPTERS} adapters": harness.Contestant(
                        partial(together, runner, engine, rows, mixed)
                    ),
                    "base, one by one": harness.Contestant(partial(in_turn, runner, engine, rows, base)),
                    f"{ADAPTERS} adapters, one by one": harness.Contestant(
                        partial(in_turn, runner, engine, rows, mixed)
                    ),
                },
                reference="base",
                options=options,
            )
        finally:
            runner.run(engine.stop())
    seconds = {name: comparison.median(name) for name in comparison.seconds}
    many = f"{ADAPTERS} adapters"
    harness.publish(
        "serve_encoder",
        title="Many adapters over one encoder, served",
        claim=(
            f"Vectors of {TEXTS} texts that come at once: {ADAPTERS} adapters take "
            f"{comparison.ratio(many):.2f}× the base's time; batches are "
            f"{seconds['base, one by one'] / seconds['base']:.1f}× as fast as one text at a time."
        ),
        tables=[harness.table([comparison], "")],
        data={"seconds": harness.seconds([comparison])},
        settings={"model": "MiniLM", "r": R, "targets": "query, value"},
        device=options.device,
        rounds=options.rounds,
    )


def write_adapters(folder: Path) -> list[str]:
    """Adapters of the encoder, none of them zero."""
    names = [f"a{i}" for i in range(ADAPTERS)]
    for seed, name in enumerate(names):
        model = minilm()
        config = lorica.LoraConfig(r=R, target_modules=QUERY_VALUE, init_lora_weights=False)
        lorica.save(lorica.adapt(model, config, seed=seed), folder / name)
    return names


def texts() -> list[Row]:
    """Token ids of texts whose lengths are log-normal, 30 on average."""
    draw = random.Random(0)
    lengths = [min(110, max(4, round(draw.lognormvariate(3.2, 0.65)))) for _ in range(TEXTS)]
    ids = torch.randint(1000, 30_000, (sum(lengths),), generator=torch.Generator().manual_seed(0)).tolist()
    return [Row([ids.pop() for _ in range(length)]) for length in lengths]


async def ask(engine: EncoderEngine, row: Row, name: str | None) -> None:
    """The vector of one text."""
    async with engine.using(name) as own:
        await own.vectors([row])


async def ask_all(engine: EncoderEngine, rows: Sequence[Row], names: Sequence[str | None]) -> None:
    """The vectors of all, at once."""
    await asyncio.gather(*(ask(engine, row, name) for row, name in zip(rows, names, strict=True)))


def together(
    runner: asyncio.Runner, engine: EncoderEngine, rows: Sequence[Row], names: Sequence[str | None], _: object
) -> None:
    """Ask for all at once."""
    runner.run(ask_all(engine, rows, names))


def in_turn(
    runner: asyncio.Runner, engine: EncoderEngine, rows: Sequence[Row], names: Sequence[str | None], _: object
) -> None:
    """Ask for one when the one before it was answered."""
    for row, name in zip(rows, names, strict=True):
        runner.run(ask(engine, row, name))


if __name__ == "__main__":
    main()
