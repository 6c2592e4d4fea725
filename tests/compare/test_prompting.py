"""Prompting: the likelihoods against a plain computation, one text at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare.spec import spec
from tokenizers import Tokenizer, models, pre_tokenizers
from train import tiny
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lorica.compare.check import check
from lorica.compare.file import FewShot
from lorica.compare.prompting import prompt
from lorica.errors import ConfigError, FileError
from lorica.train import DataConfig, Recipe, TrainingConfig

WORDS = [
    *tiny.GOOD,
    *tiny.BAD,
    *tiny.OTHER,
    "good",
    "bad",
    "Answer",
    ":",
    "N/A",
    "N",
    "A",
    "/",
    "yes",
    "no",
    "indeed",
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    words = ["<end>", "<unk>", *dict.fromkeys(WORDS)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", unk_token="<unk>", model_max_length=48
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(words),
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 48,
    }
    GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=0, bos_token_id=0)).save_pretrained(folder)
    tiny.write_data(folder / "rows")
    return folder


def recipe(decoder: Path, **data: Any) -> Recipe:
    data.setdefault("train", str(decoder / "rows"))
    rows = DataConfig(**data)
    return Recipe(model=str(decoder), data=rows, training=TrainingConfig(eval_batch_size=5))


def reference(decoder: Path, words: list[str], *, calibrate: bool) -> Iterator[int]:
    """The class of each test row, with no example before it, one text at a time."""
    model = GPT2LMHeadModel.from_pretrained(decoder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(decoder)

    @torch.no_grad()
    def likelihood(text: str, word: str) -> float:
        start = [0, *tokenizer(f"{text}\nAnswer:", add_special_tokens=False)["input_ids"]]
        end = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([start + end])).logits[0].log_softmax(-1)
        return sum(float(logits[len(start) + i - 1, token]) for i, token in enumerate(end))

    for line in (decoder / "rows" / "test.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        scores = [likelihood(text, w) - calibrate * likelihood("N/A", w) for w in words]
        yield scores.index(max(scores))


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("words", [None, ["no no", "yes"]])
def test_the_likeliest_label(words: list[str] | None, calibrate: bool, decoder: Path) -> None:
    said = list(reference(decoder, words or ["bad", "good"], calibrate=calibrate))
    rows = [json.loads(line) for line in (decoder / "rows" / "test.jsonl").read_text().splitlines()]
    right = [("bad", "good")[label] == row["label"] for label, row in zip(said, rows, strict=True)]
    found = prompt(recipe(decoder), FewShot(shots=0, words=words, calibrate=calibrate))
    assert found["scores"]["test"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert (found["trainable"], found["checkpoint_bytes"], found["steps"]) == (0, 0, 0)
    assert set(found["scores"]) == {"validation", "test"}


def test_batches_and_examples_without_room_change_nothing_else(decoder: Path) -> None:
    few = FewShot(shots=1)
    one = prompt(recipe(decoder), few)["scores"]
    other = prompt(recipe(decoder).replace(training={"eval_batch_size": 64}), few)["scores"]
    assert all(one[split] == pytest.approx(other[split]) for split in one)
    assert set(prompt(recipe(decoder), FewShot(shots=19))["scores"]["test"]) == set(one["test"])


def test_examples_before_a_prompt_to_complete(decoder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in tiny.sentences(12)]
    for split in ("train", "validation", "test"):
        tiny.write_rows(tmp_path / f"{split}.jsonl", rows)
    data = recipe(decoder, train=str(tmp_path))
    given = Recipe(task="causal-lm", model=data.model, data=data.data)
    none, three = (prompt(given, FewShot(shots=k))["scores"]["test"] for k in (0, 3))
    assert set(none) == set(three) == {"loss", "perplexity"}
    assert none["loss"] != three["loss"]
    writing = given.replace(generation={"metrics": ["bleu"], "max_new_tokens": 2})
    assert set(prompt(writing, FewShot(shots=1))["scores"]["test"]) == {"loss", "perplexity", "bleu"}


def test_what_cannot_be_prompted(decoder: Path, tmp_path: Path) -> None:
    for settings, message in (
        (FewShot(shots=21), "20 training rows of 'bad', fewer than shots=21"),
        (FewShot(words=["one"]), "has 1 words for the labels"),
    ):
        with pytest.raises(ConfigError, match=message):
            prompt(recipe(decoder), settings)
    long = [{"text": " ".join(["film"] * 60), "label": word} for word in ("good", "bad")] * 2
    for split in ("train", "test"):
        tiny.write_rows(tmp_path / "long" / f"{split}.jsonl", long)
    with pytest.raises(FileError, match="has no room in the model's 48"):
        prompt(recipe(decoder, train=str(tmp_path / "long"), validation_fraction=0), FewShot())
    numbers: list[dict[str, object]] = [{"text": "film", "score": float(i)} for i in range(4)]
    tiny.write_rows(tmp_path / "train.jsonl", numbers)
    tasks = {"n": {"task": "regression", "data": {"train": str(tmp_path / "train.jsonl"), "label": "score"}}}
    shared = {"model": str(decoder)}
    with pytest.raises(ConfigError, match="few-shot is for classification and language modelling"):
        check(
            spec(
                tmp_path, tasks=tasks, recipe=shared, split="validation", methods={"prompt": {"few-shot": {}}}
            )
        )
