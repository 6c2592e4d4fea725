"""A model, a tokenizer and rows so small that a whole run takes a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lorica import LoraConfig
from lorica.train import DataConfig, Recipe, TrainingConfig

GOOD = ("lovely", "great", "fine", "warm", "bright")
BAD = ("awful", "poor", "grim", "cold", "dull")
OTHER = ("film", "story", "voice", "scene", "plot", "song", "cast", "light")


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words and BERT's special tokens."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *OTHER]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=64,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def write_model(folder: Path) -> Path:
    """Save an encoder of two layers, 32 wide, and its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of a text with good or bad words in it, and a label that says which."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label, words = ("good", GOOD) if i % 2 else ("bad", BAD)
        text = draw.choices(OTHER, k=draw.randint(1, 8)) + draw.choices(words, k=2)
        draw.shuffle(text)
        rows.append({"text": " ".join(text), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict[str, object]] | list[dict[str, str]]) -> Path:
    """Save rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_data(folder: Path) -> Path:
    """Save a folder of train, validation and test rows."""
    for seed, (split, count) in enumerate({"train": 40, "validation": 12, "test": 12}.items()):
        write_rows(folder / f"{split}.jsonl", sentences(count, seed))
    return folder


def recipe(model: Path, data: Path, output: Path, **training: object) -> Recipe:
    """Twenty steps in two epochs, with dropout, an evaluation an epoch and no TensorBoard."""
    values = {
        "learning_rate": 1e-2,
        "epochs": 2,
        "batch_size": 4,
        "report_to": [],
        "logging_steps": 5,
        **training,
    }
    return Recipe(
        model=str(model),
        data=DataConfig(train=str(data)),
        method=LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules="all-linear"),
        training=TrainingConfig(**values),  # type: ignore[arg-type]
        output=str(output),
    )
