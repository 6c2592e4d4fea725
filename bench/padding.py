"""Batches of rows of similar lengths against batches in a random order: padding, and time of training.

Lengths are those of real rows: sentences of rotten_tomatoes for MiniLM, and E2E's tables with their sentences
for a decoder of GPT-2's shape. A turn trains on three batches of an epoch, each round on the next three.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import lorica
from lorica.train import DataConfig, Prepared, Recipe, TrainingConfig, prepare
from lorica.train.embedded import model_directory
from lorica.train.trainer.sampler import LengthGroupedSampler, padding

GROUPED, RANDOM = "by length (lorica)", "random order"
BATCHES = 3
DATA = Path(os.environ.get("LORICA_DATA") or harness.RESULTS.parents[2] / "shared" / "data")


@dataclass(frozen=True)
class Setting:
    """Rows, and the model that learns from them.

    Args:
        name: for the report.
        recipe: task, data, length and batch size.
    """

    name: str
    recipe: Recipe


def settings(folder: Path) -> list[Setting]:
    """Both settings; the decoder is made in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory(), eos_token="[SEP]", bos_token="[CLS]")
    more: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "loss_type": "ForCausalLM",
    }
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=384,
        n_layer=6,
        n_head=6,
        **more,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    films = DataConfig(preset="rotten_tomatoes", train=str(DATA / "rotten_tomatoes"))
    tables = DataConfig(train=str(DATA / "e2e_nlg" / "train.jsonl.gz"), text="context", label="completion")
    return [
        Setting(
            "rotten_tomatoes, MiniLM (6×384), 32 rows",
            Recipe(data=films, training=TrainingConfig(batch_size=32, max_length=128)),
        ),
        Setting(
            "E2E, GPT-2's shape (6×384), 16 rows",
            Recipe(
                task="causal-lm",
                model=str(folder),
                data=tables,
                training=TrainingConfig(batch_size=16, max_length=256),
            ),
        ),
    ]


def orders(prepared: Prepared) -> dict[str, list[list[int]]]:
    """The batches of an epoch, either way."""
    lengths, size = prepared.splits["train"].features["length"], prepared.recipe.training.batch_size
    random = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    grouped = list(LengthGroupedSampler(lengths, size))
    return {
        name: [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        for name, order in ((RANDOM, random), (GROUPED, grouped))
    }


def contestant(prepared: Prepared, model: nn.Module, batches: list[list[int]]) -> harness.Contestant:
    """Training on the next three batches; making them is not timed."""
    names = set(prepared.tokenizer.model_input_names) | {"labels"}
    features = prepared.splits["train"].features
    rows = features.select_columns([name for name in features.column_names if name in names])
    collate = prepared.task.collator(prepared.tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    upcoming: Iterator[list[int]] = itertools.cycle(batches)

    def train(made: list[Any]) -> None:
        for batch in made:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def prepare() -> list[Any]:
        return [collate([rows[i] for i in next(upcoming)]) for _ in range(BATCHES)]

    return harness.Contestant(train, prepare)


def main() -> None:
    """Measure, and publish."""
    options = harness.options(__doc__)
    comparisons, shares = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings(Path(folder)):
            prepared = prepare(setting.recipe)
            model = lorica.adapt(
                prepared.model, lorica.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), seed=0
            ).train()
            found = orders(prepared)
            comparisons.append(
                harness.alternate(
                    f"{setting.name}, {BATCHES} steps",
                    {name: contestant(prepared, model, found[name]) for name in (RANDOM, GROUPED)},
                    reference=RANDOM,
                    options=options,
                )
            )
            saved = padding(prepared.splits["train"].features["length"], setting.recipe.training.batch_size)
            assert saved is not None
            shares[setting.name] = saved
            print(f"padding: {saved.random:.1%} in a random order, {saved.grouped:.1%} by length", flush=True)
    harness.publish(
        "padding",
        title="Batches of similar lengths",
        claim="Share of what the model reads that is padding, over an epoch, and the time of training on the "
        "same rows, where those of similar lengths share a batch (the default of classifiers) and where they "
        "are drawn at random.",
        tables=[
            {
                "caption": "Padding, as a share of all tokens that the model reads",
                "columns": ["", RANDOM, GROUPED],
                "rows": [
                    [name, f"{each.random:.1%}", f"{each.grouped:.1%}"] for name, each in shares.items()
                ],
            },
            harness.table(
                comparisons, "Forward, backward and the optimizer's step, LoRA r=8 on all linear layers"
            ),
        ],
        data={
            "padding": {name: each._asdict() for name, each in shares.items()},
            "seconds": harness.seconds(comparisons),
        },
        settings={"batches a turn": BATCHES, "dtype": "float32"},
        device=options.device,
        rounds=options.rounds,
    )


if __name__ == "__main__":
    main()
