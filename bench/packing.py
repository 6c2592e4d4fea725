"""Rows packed into sequences against batches by length and at random: padding, and tokens per second.

Rows are E2E's tables with their sentences, for a decoder of Llama's shape. A turn trains on one batch, all of
about as many tokens, each round on the next one.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from padding import DATA
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lorica
from lorica.train import DataConfig, Recipe, TrainingConfig
from lorica.train.embedded import model_directory
from lorica.train.prepared import Encoding, encode
from lorica.train.trainer.sampler import LengthGroupedSampler, share

RANDOM, GROUPED, PACKED = "random order", "by length", "packed"
LENGTHS = (256, 512)
ROWS = 8
BATCHES = 1


def recipe(folder: Path) -> Recipe:
    """The run; its model is made in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory(), eos_token="[SEP]", bos_token="[CLS]")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = DataConfig(
        train=str(DATA / "e2e_nlg" / "train.jsonl.gz"), text="context", label="completion", train_rows=8000
    )
    training = TrainingConfig(batch_size=ROWS, max_length=128)
    return Recipe(task="causal-lm", model=str(folder), data=rows, training=training)


def batches(lengths: list[int], size: int, *, grouped: bool) -> list[list[int]]:
    """The batches of an epoch."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(LengthGroupedSampler(lengths, size)) if grouped else order
    return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]


def contestant(
    read: Encoding, model: nn.Module, found: list[list[int]], seen: list[int]
) -> harness.Contestant:
    """Training on the next batches; making them is not timed, and their tokens are counted."""
    names = {"input_ids", "attention_mask", "labels", "position_ids"}
    features = read.splits["train"].features
    rows = features.select_columns([name for name in features.column_names if name in names])
    collate = read.task.collator(read.tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    upcoming: Iterator[list[int]] = itertools.cycle(found)

    def train(made: list[Any]) -> None:
        for batch in made:
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def prepare() -> list[Any]:
        chosen = [next(upcoming) for _ in range(BATCHES)]
        seen.append(sum(features[place]["length"] for batch in chosen for place in batch))
        return [collate([rows[i] for i in batch]) for batch in chosen]

    return harness.Contestant(train, prepare)


def main() -> None:
    """Measure, and publish."""
    options = harness.options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        run = recipe(Path(folder))
        plain = encode(run)
        model = LlamaForCausalLM.from_pretrained(folder)
        lorica.adapt(model, lorica.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), seed=0)
        lengths = list(plain.splits["train"].features["length"])
        mean = sum(lengths) / len(lengths)
        ways: dict[str, tuple[Encoding, list[list[int]]]] = {
            RANDOM: (plain, batches(lengths, ROWS, grouped=False)),
            GROUPED: (plain, batches(lengths, ROWS, grouped=True)),
        }
        for length in LENGTHS:
            packed = encode(run.replace(training={"packing": True, "packed_length": length}))
            sizes = list(packed.splits["train"].features["length"])
            size = max(1, round(ROWS * mean / length))
            ways[f"{PACKED}, {size} × {length}"] = packed, batches(sizes, size, grouped=True)
        counts: dict[str, list[int]] = {name: [] for name in ways}
        model.train()
        found = harness.alternate(
            f"Llama's shape (4×256), a step of about {round(ROWS * mean):,} tokens",
            {
                name: contestant(*way, counts[name])
                for name, way in ways.items()
                for way in [(way[0], model, way[1])]
            },
            reference=RANDOM,
            options=options,
        )
    figures = []
    for name, (read, chosen) in ways.items():
        sizes = list(read.splits["train"].features["length"])
        order = list(itertools.chain.from_iterable(chosen))
        padding = share(sizes, order, len(chosen[0]))
        timed = zip(counts[name][-len(found.seconds[name]) :], found.seconds[name], strict=True)
        speeds = sorted(tokens / seconds for tokens, seconds in timed)
        figures.append((name, padding, speeds[len(speeds) // 2]))
        print(f"{name}: {padding:.1%} padding, {figures[-1][2]:,.0f} tokens/s", flush=True)
    harness.publish(
        "packing",
        title="Packed rows",
        claim="Share of what the model reads that is padding, and tokens that are no padding per second of "
        "training, where rows stand alone in batches and where several are packed into one sequence.",
        tables=[
            {
                "caption": f"E2E, 8,000 rows of {mean:.0f} tokens in the mean; LoRA r=8 on all linear layers",
                "columns": ["", "padding", "tokens/s", "to a random order"],
                "rows": [
                    [name, f"{padding:.1%}", f"{speed:,.0f}", f"{speed / figures[0][2]:.2f}×"]
                    for name, padding, speed in figures
                ],
            }
        ],
        data={"ways": [dict(zip(("name", "padding", "tokens_per_second"), f, strict=True)) for f in figures]},
        settings={"batches a turn": BATCHES, "dtype": "float32"},
        device=options.device,
        rounds=options.rounds,
    )


if __name__ == "__main__":
    main()
