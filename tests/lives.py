"""What a random life of adapters begins with: small models, and configurations that PEFT has too."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import batch, transformer
from torch import Tensor, nn

VOCABULARY = 11


class Plain(nn.Module):
    """Every kind of layer that both libraries adapt, in turn."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(VOCABULARY, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6, bias=False)}) for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.mix = Conv1D(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.mT).mT
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["down"](block["up"](x).tanh())
        x = x + self.attention(x, x, x)[0]
        return self.head(self.norm(x + self.mix(x)))


class Encoder(nn.Module):
    """torch's own encoder, whose kernels read weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)))


@dataclass(frozen=True)
class Base:
    """A model to adapt.

    Args:
        make: it, the same every time.
        inputs: what it is called with.
        targets: names of modules that both libraries adapt.
        patterns: other forms of naming them.
        whole: modules that can be trained whole.
        blocks: number of blocks, where PEFT finds them (not at the top of a model).
        settings: fields that it needs.
        biased: whether every layer has a bias.
    """

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    targets: tuple[str, ...]
    patterns: tuple[str, ...]
    whole: tuple[str, ...]
    blocks: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    biased: bool = False


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        torch.manual_seed(7)
        return make().eval()

    return built


IDS = {"ids": torch.randint(0, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(2))}
BASES = {
    "plain": Base(
        seeded(Plain),
        IDS,
        ("embed", "conv", "up", "down", "blocks.1.up", "mix"),
        (r".*\.(up|down)", r"blocks\.0\..*", "conv|mix"),
        ("head", "norm"),
    ),
    "attention": Base(seeded(Plain), IDS, ("attention", "up"), (r"attention|blocks\.1\.down",), ("head",)),
    "encoder": Base(seeded(Encoder), IDS, ("linear1", "linear2", "embed"), (r".*linear\d",), ("head",), 2),
    "bert": Base(
        lambda: transformer("bert-classifier"),
        batch(),
        ("query", "value", "attention.output.dense", "intermediate.dense", "word_embeddings"),
        (r".*layer\.1\..*(query|key)", "all-linear", r".*\.dense"),
        ("classifier", "pooler"),
        2,
        biased=True,
    ),
    "llama": Base(
        lambda: transformer("llama"),
        batch(),
        ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "1.mlp.up_proj", "embed_tokens"),
        (r".*(q|v)_proj", "all-linear", r"model\.layers\.0\..*_proj"),
        ("lm_head", "norm"),
        2,
    ),
    "gpt2": Base(
        lambda: transformer("gpt2"),
        batch("gpt2"),
        ("c_attn", "c_proj", "mlp.c_fc", "wpe"),
        (r".*attn\.c_(attn|proj)", "all-linear"),
        ("ln_f",),
        2,
        {"fan_in_fan_out": True},
        biased=True,
    ),
}


def configuration(draw: random.Random, base: Base, *, first: bool, biases: bool) -> dict[str, Any]:
    """Fields that both libraries have, for one adapter.

    Args:
        draw: source of the choices.
        base: what it is for.
        first: whether it comes first; PEFT's patterns also match what an earlier adapter trains whole.
        biases: whether it may train biases.
    """
    form = draw.random()
    targets: Any
    if form < 0.7 or not first:
        targets = draw.sample(base.targets, draw.randint(1, min(3, len(base.targets))))
    else:
        targets = draw.choice(base.patterns)
    given: dict[str, Any] = {
        "r": draw.choice([1, 2, 3, 4]),
        "lora_alpha": draw.choice([1, 2, 5, 8]),
        "target_modules": targets,
        **base.settings,
    }
    if draw.random() < 0.3:
        given["use_rslora"] = True
    if draw.random() < 0.25:
        given["use_dora"] = True
    elif base.biased and draw.random() < 0.2:
        given["lora_bias"] = True
    if draw.random() < 0.3:
        given["init_lora_weights"] = draw.choice([False, "gaussian", "olora", "pissa", "orthogonal"])
    if isinstance(targets, list) and draw.random() < 0.25:
        given["rank_pattern"] = {draw.choice(targets): draw.choice([1, 2, 5])}
    if isinstance(targets, list) and draw.random() < 0.25:
        given["alpha_pattern"] = {draw.choice(targets): draw.choice([1, 3, 16])}
    if draw.random() < 0.2:
        given["modules_to_save"] = [draw.choice(base.whole)]
    if biases and draw.random() < 0.3:
        given["bias"] = draw.choice(["all", "lora_only"])
    if base.blocks and isinstance(targets, list) and draw.random() < 0.2:
        given["layers_to_transform"] = draw.choice([0, [1], [0, 1]])
    if draw.random() < 0.15:
        given["exclude_modules"] = [draw.choice(base.targets)]
    return given
