"""Makes a local Hub cache of tiny models with random weights, under the names that PEFT's tests load.

``python stand_ins.py FOLDER``; then ``HF_HUB_CACHE=FOLDER HF_HUB_OFFLINE=1``.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

INNER, HF, TRL = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"
WORDS = 1024
LLAMA: dict[str, Any] = {
    "vocab_size": WORDS,
    "initializer_range": 0.5,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
}
OPT = {"vocab_size": WORDS, "max_position_embeddings": 512, "pad_token_id": 1, "bos_token_id": 2}
SMALL_OPT = OPT | {
    "eos_token_id": 2,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 5,
    "ffn_dim": 32,
    "num_attention_heads": 4,
}
OPT_125M = SMALL_OPT | {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 12, "ffn_dim": 128}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512} | {
    "bos_token_id": 2,
    "eos_token_id": 2,
}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 3, "num_heads": 4} | {
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART = {"vocab_size": WORDS, "d_model": 24, "max_position_embeddings": 512} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("ffn_dim", 32), ("attention_heads", 2))
}
CLIP_TEXT = BERT | {"num_hidden_layers": 2, "max_position_embeddings": 77, "projection_dim": 32}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
} | {
    "image_size": 30,
    "patch_size": 6,
    "projection_dim": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

# Name on the Hub → model class, configuration class, what makes it small.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"{owner}tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", SMALL_OPT)
        for owner in (INNER, HF)
    },
    **dict.fromkeys((f"{INNER}opt-125m", "facebook/opt-125m"), ("OPTForCausalLM", "OPTConfig", OPT_125M)),
    **dict.fromkeys(
        (f"{INNER}tiny-random-GPT2LMHeadModel", f"{INNER}tiny-random-gpt2", f"{HF}tiny-random-gpt2"),
        ("GPT2LMHeadModel", "GPT2Config", GPT2),
    ),
    f"{INNER}tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "GPTJConfig",
        GPT2 | {"n_layer": 3, "rotary_dim": 4},
    ),
    **{
        f"{owner}tiny-random-LlamaForCausalLM": (
            "LlamaForCausalLM",
            "LlamaConfig",
            LLAMA | {"num_key_value_heads": 4},
        )
        for owner in (INNER, HF, TRL)
    },
    f"{INNER}tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    f"{TRL}tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 8}),
    f"{HF}tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", LLAMA),
    f"{HF}tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        LLAMA | {"head_dim": 8, "sliding_window": 64, "num_hidden_layers": 3},
    ),
    f"{TRL}tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", "LlamaConfig", LLAMA),
    f"{TRL}tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        LLAMA
        | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 32, "head_dim": 8}
        | {"interleave_moe_layer_step": 1, "attention_chunk_size": 64},
    ),
    f"{TRL}tiny-GptOssForCausalLM": (
        "GptOssForCausalLM",
        "GptOssConfig",
        LLAMA | EXPERTS | {"num_local_experts": 4, "sliding_window": 64},
    ),
    f"{TRL}tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        LLAMA | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    f"{HF}Mixtral-tiny": ("MixtralForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 4}),
    **{
        f"{INNER}{name}": ("T5ForConditionalGeneration", "T5Config", T5)
        for name in (
            "tiny-random-T5ForConditionalGeneration-calibrated",
            "tiny-random-t5",
            "tiny-random-T5ForConditionalGeneration",
        )
    },
    f"{INNER}tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", "BartConfig", BART),
    **{f"{owner}tiny-random-BertModel": ("BertModel", "BertConfig", BERT) for owner in (INNER, HF)},
    f"{INNER}tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", BERT),
    f"{INNER}tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        BERT,
    ),
    f"{INNER}tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        BERT,
    ),
    f"{INNER}tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", BERT | RELATIVE),
    f"{INNER}tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", BERT | RELATIVE),
    f"{INNER}tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    f"{INNER}tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    f"{INNER}tiny-clip-text-2": ("CLIPTextModelWithProjection", "CLIPTextConfig", CLIP_TEXT),
    f"{INNER}tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        "ResNetConfig",
        RESNET,
    ),
}
# Name of an adapter on the Hub → name of its base, task.
ADAPTERS = {
    f"{INNER}tiny-OPTForCausalLM-lora": (f"{INNER}tiny-random-OPTForCausalLM", "CAUSAL_LM"),
    f"{INNER}gpt2-lora-random": (f"{INNER}tiny-random-gpt2", "CAUSAL_LM"),
    f"{INNER}opt-125m-dummy-lora": (f"{INNER}opt-125m", "CAUSAL_LM"),
    f"{INNER}tiny_T5ForSeq2SeqLM-lora": (f"{INNER}tiny-random-t5", "SEQ_2_SEQ_LM"),
    f"{INNER}tiny-random-BertModel-lora": (f"{INNER}tiny-random-BertModel", None),
}


def tokenizer() -> Any:
    """Byte pairs of one sentence, and the special tokens of all the models."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["the quick brown fox jumps over the lazy dog hello world"] * 20, trainer)
    names = ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        **dict(zip(names, special, strict=True)),
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=512,
    )


def make(name: str) -> Any:
    """The model of that name; every call gives the same weights."""
    torch.manual_seed(0)
    if name == f"{HF}tiny-random-LlavaForConditionalGeneration":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**LLAMA),
        )
        return transformers.LlavaForConditionalGeneration(config)
    model, config, small = MODELS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**small))


def put(cache: Path, name: str, save: Callable[[Path], None]) -> None:
    """Lay a repository out as the Hub's cache has it."""
    folder, commit = cache / f"models--{name.replace('/', '--')}", hashlib.sha1(name.encode()).hexdigest()
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    try:
        save(snapshot)
    except Exception as error:
        shutil.rmtree(folder)
        print(f"no stand-in for {name}: {type(error).__name__}: {error}", flush=True)


def save_model(name: str, folder: Path) -> None:
    """Write a model, and a tokenizer where it reads text."""
    make(name).save_pretrained(folder)
    if "ResNet" not in name:
        tokenizer().save_pretrained(folder)


def save_adapter(base: str, task: str | None, folder: Path) -> None:
    """Write an adapter of PEFT's that changes its base's output."""
    model = make(base)
    model.name_or_path = base
    config = LoraConfig(r=8, lora_alpha=16, init_lora_weights=False, task_type=task)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(folder))


def main(cache: Path) -> None:
    """Fill an empty folder."""
    torch.set_num_threads(1)
    for name in (*MODELS, f"{HF}tiny-random-LlavaForConditionalGeneration"):
        put(cache, name, lambda folder, name=name: save_model(name, folder))
    for name, (base, task) in ADAPTERS.items():
        put(cache, name, lambda folder, base=base, task=task: save_adapter(base, task, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
