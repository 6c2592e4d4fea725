"""A tiny decoder, adapters of every sort for it, and what each of them answers alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch

import lorica
from lorica.serve import Sampling, Step

CONTEXT = 160
KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 8, "target_modules": "all-linear"},
    "some": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 2, "use_rslora": True, "target_modules": ["up_proj", "down_proj"]},
    "wide": {"r": 12, "target_modules": ["q_proj", "gate_proj", "o_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "biased": {"r": 4, "lora_bias": True, "target_modules": ["k_proj", "down_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "v_proj"]},
    "copied": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def decoder(name: str = "llama", **settings: Any) -> Any:
    """A tiny decoder that never ends an answer itself, and looks at all that came before."""
    length = "n_positions" if name == "gpt2" else "max_position_embeddings"
    known: dict[str, Any] = {length: CONTEXT, "eos_token_id": None}
    model = tiny.transformer(name, **known | settings)
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # as it is drawn, it repeats itself whatever it is asked
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def write_adapter(model: Any, folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Save an adapter that changes all it can, of a model that is left as it was."""
    own = copy.deepcopy(model)
    lorica.adapt(own, lorica.LoraConfig(**config), seed=seed)
    tiny.shake(own, seed, 0.4)
    return lorica.save(own, folder)


class Alone:
    """What each adapter answers when nothing else is asked, by the layers that `lorica.load` makes."""

    def __init__(self, model: Any) -> None:
        self.base = copy.deepcopy(model)
        self.models: dict[Path | None, Any] = {None: self.base}

    def logits(self, folder: Path | None, ids: Sequence[int]) -> torch.Tensor:
        """Of every token, (tokens, vocabulary)."""
        if folder is not None and folder not in self.models:
            self.models[folder] = lorica.load(copy.deepcopy(self.base), folder)
        with torch.no_grad():
            return self.models[folder](torch.tensor([ids])).logits[0]

    def agrees(self, folder: Path | None, prompt: Sequence[int], answer: Sequence[int], count: int) -> bool:
        """Whether an answer has so many tokens, each the most likely after what came before it."""
        likeliest = self.logits(folder, [*prompt, *answer]).argmax(-1)[len(prompt) - 1 : -1]
        return len(answer) == count and likeliest.tolist() == list(answer)


class Letters:
    """A tokenizer that writes a letter for each token; token 9 is half of a character, 10 its other half."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        text = bytes(b for id in ids for b in self._bytes(id))
        return text.decode("utf-8", errors="replace")

    def _bytes(self, id: int) -> bytes:
        return {0: b"", 9: b"\xc3", 10: b"\xa9"}.get(id, bytes([87 + id if id > 9 else 48 + id]))


def greedy(tokens: int = 8, **fields: Any) -> Sampling:
    """Sampling of the most likely tokens."""
    return Sampling(max_tokens=tokens, temperature=0, **fields)


async def collect(answer: Any) -> list[Step]:
    """All steps of an answer."""
    return [step async for step in answer]


async def ids_of(answer: Any) -> list[int]:
    """The tokens of an answer."""
    return [token.id for step in await collect(answer) for token in step.tokens]


def root(folders: dict[str, Path]) -> Path:
    return next(iter(folders.values())).parent


def prompts(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 40) for _ in range(draw.randint(low, high))] for _ in range(count)]
