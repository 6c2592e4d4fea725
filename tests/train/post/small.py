"""A decoder, pairs of answers and a reward so small that a whole run takes a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from train import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from lorica import LoraConfig
from lorica.train import DataConfig, Recipe, TrainingConfig
from lorica.train.settings import PostConfig


def write_decoder(folder: Path) -> Path:
    """Save a decoder of two layers, 32 wide, and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # so that words can be told apart
    model.save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    tokenizer.save_pretrained(folder)
    return folder


def pairs(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of a word, answers of a good word and of a bad one."""
    draw = random.Random(seed)
    return [
        {
            "prompt": draw.choice(tiny.OTHER),
            "chosen": f" {draw.choice(tiny.GOOD)} {draw.choice(tiny.OTHER)}",
            "rejected": f" {draw.choice(tiny.BAD)} {draw.choice(tiny.OTHER)}",
        }
        for _ in range(count)
    ]


REWARD = f"""
GOOD = {tiny.GOOD!r}

def good(prompts, completions, **columns):
    return [sum(word in GOOD for word in text.split()) for text in completions]

def short(completions, **columns):
    return [-0.1 * len(text.split()) for text in completions]

def broken(completions, **columns):
    return ["a lot"] * len(completions)
"""


def recipe(
    base: Path, rows: Path, output: Path, task: str, post: dict[str, Any] | None = None, **more: Any
) -> Recipe:
    """Two passes, an evaluation each, a checkpoint every third step."""
    values: dict[str, Any] = {
        "learning_rate": 1e-2,
        "epochs": 2,
        "batch_size": 8,
        "save_steps": 3,
        "save_total_limit": 9,
        "report_to": [],
        "logging_steps": 1,
        "load_best": False,
        **more.pop("training", {}),
    }
    return Recipe(
        task=task,
        model=str(base),
        data=DataConfig(train=str(rows), **more.pop("data", {})),
        method=LoraConfig(r=4, target_modules="all-linear"),
        training=TrainingConfig(**values),
        post=PostConfig(**(post or {})),
        output=str(output),
        **more,
    )
