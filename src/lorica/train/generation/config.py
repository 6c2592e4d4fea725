"""`GenerationConfig`: how text is written, and what it is scored by. A part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorica.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How text is written, and what it is scored by.

    The most likely token each time, unless this says otherwise: a model's own generation_config.json is asked
    for its special tokens, and for nothing else.

    Args:
        metrics: scores of what the model writes, in each evaluation: any of "bleu", "nist", "ter", "rouge",
            "meteor", "rouge_l", "cider", "exact_match", "f1", "logical_form". Empty writes nothing there, and
            leaves loss and perplexity.
        max_new_tokens: tokens written at most.
        num_beams: continuations kept in beam search; 1 searches none.
        length_penalty: exponent of the length by which a beam's log-likelihood is divided: above 0 favours
            long texts.
        no_repeat_ngram_size: no run of so many tokens is written twice; 0 allows all.
        repetition_penalty: divisor of the odds of tokens that were there before; 1 is none.
        do_sample: draw tokens instead of taking the most likely.
        temperature: divisor of the logits in drawing; below 1 is more certain.
        top_k: draw from so many of the most likely tokens; 0 is all.
        top_p: draw from the most likely tokens that together have this probability; 1 is all.
        batch_size: prompts that are written for at once, on each device.
        eval_rows: prompts written for in an evaluation during training, the first ones. None takes all; the
            scores after training always rest on all.
        arguments: any other fields of transformers.GenerationConfig, passed on as they are.
    """

    metrics: list[str] = field(default_factory=list)
    max_new_tokens: int = 64
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    batch_size: int = 16
    eval_rows: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("max_new_tokens", "num_beams", "batch_size", "repetition_penalty", "temperature"):
            _expect(self, name, getattr(self, name) > 0, "more than 0")
        for name in ("no_repeat_ngram_size", "top_k"):
            _expect(self, name, getattr(self, name) >= 0, "0 or more")
        _expect(self, "top_p", 0 < self.top_p <= 1, "a probability in (0, 1]")
        _expect(self, "eval_rows", self.eval_rows is None or self.eval_rows > 0, "None or more than 0")


def _expect(config: GenerationConfig, name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ConfigError(f"generation.{name} must be {expected}, not {getattr(config, name)!r}")
