"""Models small enough to learn on one core in a minute; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_rows
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from lorica.train.embedded import MODEL, model_directory

PRETRAINED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorica" / "tiny-gpt2"
"""Where bench/pretrain_tiny_gpt2.py leaves a decoder."""

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def decoder(folder: Path) -> str:
    """A decoder pretrained by bench/pretrain_tiny_gpt2.py, as far as it has come, or of random weights."""
    if (PRETRAINED / "model.safetensors").is_file():
        shutil.copytree(PRETRAINED, folder, dirs_exist_ok=True)
        return "tiny GPT-2, pretrained here"
    tokenizer = AutoTokenizer.from_pretrained(model_directory(), eos_token="[SEP]", bos_token="[CLS]")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=256, n_layer=6, n_head=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return _save(folder, GPT2LMHeadModel, config, tokenizer)


def narrow_decoder(folder: Path) -> str:
    """GPT-2's shape, 2 layers of width 64, random weights: it learns what answers are like, not to write.

    Its 1,000 pieces of words are those of the docstrings, in `own_rows`.
    """
    pieces = AutoTokenizer.from_pretrained(model_directory()).train_new_from_iterator(
        [function.sentence for function in own_rows.functions()], 1000
    )
    core = pieces.backend_tokenizer
    core.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    end: Any = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=192, n_embd=64, n_layer=2, n_head=2, initializer_range=0.1,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    return _save(folder, GPT2LMHeadModel, config, tokenizer)


def chat(folder: Path) -> str:
    """The decoder, with a chat template."""
    name = decoder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return name


def encoder_decoder(folder: Path) -> str:
    """T5's shape, 2 and 2 layers of width 192, with the vocabulary of MiniLM."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory(), eos_token="[SEP]")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=192, d_kv=48, d_ff=384, num_layers=2, num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportCallIssue]
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return _save(folder, T5ForConditionalGeneration, config, tokenizer)


def vision(folder: Path) -> str:
    """ViT's shape, 4 layers of width 128, for images of 64 x 64 in patches of 8 x 8."""
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=64,
        patch_size=8,
    )  # fmt: skip
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    return _save(folder, ViTForImageClassification, config, processor)


MAKERS: dict[str, Callable[[Path], str]] = {
    maker.__name__: maker for maker in (decoder, narrow_decoder, chat, encoder_decoder, vision)
}


def place(kind: str, models: Path) -> str:
    """What `lorica train` takes as its model.

    Args:
        kind: ``minilm``, which is installed and needs no making, or a key of `MAKERS`.
        models: folder of those that were made.
    """
    return MODEL if kind == "minilm" else str(models / kind)


def make(kind: str, models: Path) -> str:
    """Make a model, unless it is there already, and say what to call it; arguments as for `place`."""
    if kind == "minilm":
        return "MiniLM"
    about = models / kind / "about.txt"  # written last, so what is there is whole
    if not about.is_file():
        name = MAKERS[kind](models / kind)
        about.write_text(name, encoding="utf-8")
    return about.read_text(encoding="utf-8")


def _save(folder: Path, kind: Any, config: Any, reader: Any) -> str:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    reader.save_pretrained(folder)
    return f"small {config.model_type}, random weights"
