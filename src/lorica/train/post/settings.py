"""What is optimised after instruction tuning: a recipe's part ``post``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorica.train.settings import expect

PAIRED = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm"),
)
"""Losses of pairs of answers that are measured against a reference; TRL's DPOTrainer has them."""

JUDGED = ("kto", "apo_zero_unpaired")
"""Losses of answers that were judged alone, against a reference; TRL's KTOTrainer has them."""

FREE = ("simpo", "cpo", "orpo")
"""Losses of pairs without a reference; TRL has them among its experiments."""

GROUPED = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
"""Losses of TRL's GRPOTrainer."""

LOSSES = (*PAIRED, *JUDGED, *FREE, *GROUPED)


@dataclass(frozen=True, kw_only=True)
class PostConfig:
    """Preferences and rewards: the loss, and for reinforcement where answers and their rewards come from.

    The reference is the adapter's own start, on the same base.

    Args:
        loss: of preferences "sigmoid" (DPO), "ipo", "hinge", "robust" or another that TRL's DPOTrainer has,
            "kto" for answers that were judged alone, or "simpo", "cpo", "orpo", which need no reference; of
            grpo "dapo", "grpo", "dr_grpo" or another that TRL's GRPOTrainer has. None takes "sigmoid" for
            pairs, "kto" for judged answers, "dapo" for grpo.
        beta: pull towards the reference. None takes TRL's: 0.1 for DPO and KTO, 0 for grpo, 0.05 for rloo.
        label_smoothing: share of preferences, in [0, 0.5), that are taken to be the wrong way round.
        rewards: what scores an answer: functions as ``path/to/file.py:function`` or
            ``package.module:function``; folders of runs of the task reward, whose adapter joins this base.
        reward_weights: weight of each reward in their sum. None weighs them alike.
        generations: answers to each prompt, that are compared with one another.
        max_new_tokens: tokens of an answer at most.
        temperature: divisor of the logits in drawing answers.
        top_p: draw from the most likely tokens that together have this probability; 1 is all.
        arguments: any other fields of TRL's configuration (DPOConfig, KTOConfig, CPOConfig, ORPOConfig,
            RewardConfig, GRPOConfig, RLOOConfig), passed on as they are.
    """

    loss: str | None = None
    beta: float | None = None
    label_smoothing: float = 0.0
    rewards: list[str] = field(default_factory=list)
    reward_weights: list[float] | None = None
    generations: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values."""
        of = "post."
        expect(self, "loss", self.loss is None or self.loss in LOSSES, f"None or one of {LOSSES}", of)
        expect(self, "beta", self.beta is None or self.beta >= 0, "None, or 0 or more", of)
        expect(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "a share in [0, 0.5)", of)
        expect(self, "generations", self.generations > 1, "at least 2", of)
        expect(self, "max_new_tokens", self.max_new_tokens > 0, "more than 0", of)
        expect(self, "temperature", self.temperature > 0, "more than 0", of)
        expect(self, "top_p", 0 < self.top_p <= 1, "a probability in (0, 1]", of)
        weights = self.reward_weights
        alike = weights is None or len(weights) == len(self.rewards)
        expect(self, "reward_weights", alike, f"a weight for each of the {len(self.rewards)} rewards", of)
