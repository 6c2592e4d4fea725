"""What the soak serves, and what each adapter says alone: models, adapters and the answers that are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import lorica
from lorica.train import embedded

disable_progress_bar()
set_verbosity_error()

WORDS, LONGEST, CLEAR = 400, 48, 1e-3
"""Words of the vocabulary; tokens of an answer; how far the likeliest token must be ahead to be sure."""
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
SWAPPED, VISITOR, GUEST = "swapped", "visitor", "guest"
"""Adapters that change their content in the folder; come and go over HTTP; come and go in the folder."""
FIXED = 6
CONTENTS: dict[str, dict[str, Any]] = {
    "c0": {"r": 4, "target_modules": "all-linear"},
    "c1": {"r": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "c2": {"r": 2, "target_modules": "all-linear", "use_dora": True},
    "c3": {"r": 16, "target_modules": ["up_proj", "down_proj"]},
    "c4": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "c5": {"r": 4, "target_modules": ["o_proj", "lm_head"]},
    "c6": {"r": 4, "target_modules": "all-linear"},
    "c7": {"r": 8, "target_modules": "all-linear"},
    "c8": {"r": 4, "target_modules": ["gate_proj", "k_proj"]},
}
LABELS = {"c0": 2, "c1": 3, "c2": 4, "c3": 2, "c4": 3, "c5": 2, "c6": 3, "c7": 2, "c8": 4}
TEXTS = (
    "a film to remember",
    "dull, long and loud",
    "the second half is better than the first, though it takes its time and nobody seems to mind",
    "short",
    "what a cast, what a voice, what a waste of a fine story that could have been told in half an hour",
    "warm and light",
    "grim",
    "I would see it again tomorrow; my brother would rather not, and he has seen more films than I have",
)


def write_decoder(folder: Path) -> None:
    """A small Llama, adapters for it in ``pool``, and ``expected.json``."""
    torch.set_num_threads(1)
    words = {"end": 0, "user": 1, "assistant": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    core = Tokenizer(WordLevel(words, unk_token="end"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="end", unk_token="end", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    model: Any = LlamaForCausalLM(config).eval()
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    prompts = _prompts()
    chats = [[{"role": "user", "content": text}] for text in prompts[:3]]
    laid_out: list[Any] = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    ids = [tokenizer(text)["input_ids"] for text in [*prompts, *laid_out]]
    answers = {"base": [_answer(model, own, tokenizer) for own in ids]}
    for seed, (name, fields) in enumerate(CONTENTS.items()):
        lorica.adapt(model, lorica.LoraConfig(init_lora_weights=False, **fields), name, seed=seed)
        _disturb(model, seed, 0.15)
        lorica.save(model, folder / "pool" / name, name)
        answers[name] = [_answer(model, own, tokenizer) for own in ids]
        lorica.detach(model)
    _write(folder, {"prompts": prompts, "chats": chats, "answers": answers})


def write_encoder(folder: Path) -> None:
    """MiniLM, adapters with heads for it in ``pool``, and ``expected.json``."""
    torch.set_num_threads(1)
    here = embedded.model_directory()
    tokenizer = AutoTokenizer.from_pretrained(here)
    encoded = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    answers = {}
    for seed, (name, labels) in enumerate(LABELS.items()):
        torch.manual_seed(seed)
        model: Any = AutoModelForSequenceClassification.from_pretrained(here, num_labels=labels).eval()
        config = lorica.LoraConfig(
            r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False
        )
        lorica.adapt(model, config, seed=seed)
        _disturb(model, seed, 0.1)
        lorica.save(model, folder / "pool" / name)
        answers[name] = [_reading(model.eval(), own) for own in encoded]
    plain: Any = AutoModelForSequenceClassification.from_pretrained(here).eval()
    answers["base"] = [_reading(plain, own) for own in encoded]
    _write(folder, {"prompts": TEXTS, "answers": answers})


def _prompts() -> list[str]:
    """Some short, some long, some with one beginning."""
    draw = torch.Generator().manual_seed(1)

    def text(words: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, WORDS, (words,), generator=draw).tolist())

    shared = text(60)
    return [text(2), text(9), text(30), text(150), text(300), shared, *(f"{shared} {text(5)}" for _ in "ab")]


def _disturb(model: Any, seed: int, deviation: float) -> None:
    """Random weights for what is trained: adapters that differ clearly."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(deviation * torch.randn(parameter.shape, generator=draw))


@torch.no_grad()
def _answer(model: Any, ids: list[int], tokenizer: Any) -> dict[str, Any]:
    """The likeliest tokens by transformers' own generation, as far as none is a near tie, and logarithms."""
    prompt = torch.tensor([ids])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=LONGEST,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    tokens = made.sequences[0, len(ids) :].tolist()
    logits = torch.cat(made.logits)
    two = logits.topk(2).values
    near = (two[:, 0] - two[:, 1] < CLEAR).nonzero().flatten().tolist()
    sure = near[0] if near else len(tokens)
    logs = logits.log_softmax(-1)
    read = model(prompt).logits[0].log_softmax(-1)
    return {
        "words": [tokenizer.decode([token]) for token in tokens[:sure] if token],
        "ends": 0 in tokens[:sure],
        "sure": sure,
        "logprobs": [float(logs[i, token]) for i, token in enumerate(tokens[:sure])],
        "read": [float(read[i, token]) for i, token in enumerate(ids[1:])],
    }


@torch.no_grad()
def _reading(model: Any, encoded: Any) -> dict[str, Any]:
    hidden = model.base_model(**encoded).last_hidden_state[0].mean(0)
    probs = model(**encoded).logits[0].softmax(-1)
    return {"probs": probs.tolist(), "vector": torch.nn.functional.normalize(hidden, dim=0).tolist()}


def _write(folder: Path, expected: dict[str, Any]) -> None:
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
