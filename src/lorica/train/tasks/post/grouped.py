"""Prompts alone: the model answers each several times, and learns which of its answers had more reward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorica.errors import ConfigError
from lorica.train.data.forms import asked_of, find_asked
from lorica.train.data.rows import read_each
from lorica.train.data.splits import Splits
from lorica.train.settings import GROUPED, DataConfig
from lorica.train.tasks.base import Encoded
from lorica.train.tasks.causal_lm import CausalLanguageModelling
from lorica.train.tasks.post.answers import PostTask, prompts_to_answer, question_tokens

PROMPT = "prompt"
"""Column of encoded rows: the prompt, as a reward function is given it."""


class Grouped(PostTask, CausalLanguageModelling):
    """Learns from the rewards of its own answers, each compared with the others to the same prompt.

    Rows need a prompt (``data.text``), a text or messages; their other columns are given to the rewards.
    """

    best_metric = "reward"
    keeps_start = reads_all = True
    packs = False
    separator = "\n"
    max_length = 128

    def settled(self, recipe: Any) -> Self:
        """The task with what a recipe says of it.

        Raises:
            ConfigError: it names a batch that does not hold whole groups of answers.
        """
        post, training = recipe.post, recipe.training
        answers = training.batch_size * training.gradient_accumulation
        if answers % post.generations:
            raise ConfigError(
                f"training.batch_size × training.gradient_accumulation, {answers} answers a step, must be a "
                f"multiple of post.generations, {post.generations}"
            )
        if training.auto_batch_size:
            raise ConfigError(f"auto_batch_size tries steps on given rows, and {self.name} writes its own")
        result = super().settled(recipe)
        result.separator, result.max_length = recipe.data.separator, training.max_length
        return result

    def ready(self) -> None:
        """Check that there is a reward; rows can be looked at without one.

        Raises:
            ConfigError: there is none.
        """
        if not self.post.rewards:
            raise ConfigError(
                f"{self.name} needs a reward: --reward path/to/file.py:function, which takes prompts and "
                "completions and returns a number for each; or the folder of a run of the task reward"
            )

    @property
    def copies(self) -> int:
        """Answers to each row."""
        return self.post.generations

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the prompt."""
        if data.labels or data.label:
            raise ConfigError(
                f"{self.name} has no right answers of its own: leave out data.labels and data.label; each "
                "column is given to the rewards"
            )
        data = find_asked(splits.train, data)
        if data.tools is not None:
            raise ConfigError(f"{self.name} calls no tools; leave out the column {data.tools!r}")
        first, *_ = asked_of(splits.train.select(range(1)), data, "the training rows")
        return data if isinstance(first.prompt, str) else replace(data, messages=True)

    def encode(
        self,
        rows: Dataset,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        where: str,
        *,
        labelled: bool = True,
    ) -> Encoded:
        """Read the prompts and count their tokens; the other columns stay as they are."""
        limit = self.limit(tokenizer)
        if "length" in rows.column_names:
            raise ConfigError(f"{where} have a column 'length', which is the trainer's own; rename it")
        asked = [each.prompt for each in asked_of(rows, data, where)]
        laid = read_each(asked, lambda said: question_tokens(tokenizer, said, None, data.separator), where)
        lengths = [len(ids) for ids in laid]
        parts = [name for name in self.inputs(data) if name in rows.column_names]
        others = {name: rows[name][:] for name in rows.column_names if name not in parts and name != PROMPT}
        features = {PROMPT: asked, **others, "length": [min(length, limit) for length in lengths]}
        truncated = sum(length > limit for length in lengths)
        return Encoded(Dataset.from_dict(features), truncated, max(lengths), lengths=lengths)

    def limit(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of a prompt at most.

        Raises:
            ConfigError: an answer leaves no room for one.
        """
        room = tokenizer.model_max_length - self.post.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"post.max_new_tokens, {self.post.max_new_tokens}, leaves no room for a prompt in the "
                f"{tokenizer.model_max_length} tokens that the model reads"
            )
        return min(self.max_length, room)

    def notes(self, rows: Dataset, data: DataConfig) -> list[str]:
        """The form of the rows."""
        others = [name for name in rows.column_names if name not in self.inputs(data)]
        given = f"; the rewards are given {', '.join(others)} too" if others else ""
        return [f"its rows are prompts ({' + '.join(self.inputs(data))}){given}"]

    def prompts(
        self, rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
    ) -> list[list[int]]:
        """The prompt and the separator; a conversation up to where the assistant speaks."""
        return prompts_to_answer(rows, data, tokenizer, where)


class GroupRelative(Grouped):
    """Advantage of an answer: its reward less the group's mean, over their spread.

    Source: Shao et al., 2024, "DeepSeekMath", equation 3.
    """

    name = "grpo"
    losses = GROUPED


class LeaveOneOut(Grouped):
    """Advantage of an answer: its reward less the mean of the others'.

    Source: Ahmadian et al., 2024, "Back to Basics", equation 8.
    """

    name = "rloo"
