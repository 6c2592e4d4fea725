"""Reward models: a number for an answer, learned from pairs of which one is better (Bradley and Terry)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError
from lorica.train.data.forms import Pair, Said, answered_of, find_pairs, pairs_of
from lorica.train.data.forms.messages import Tools
from lorica.train.data.rows import read_each
from lorica.train.data.splits import Splits
from lorica.train.settings import DataConfig
from lorica.train.tasks.base import Encoded, padded_right
from lorica.train.tasks.post.answers import PostTask, answer_tokens, as_answered, fitted
from lorica.train.tasks.prompts import prompt_columns
from lorica.train.tasks.texts import logits_of, split_pairs

ANSWER = "answer"
"""Column of the answer in rows to score, beside their prompt."""


class Reward(PostTask):
    """Learns a number for a prompt and its answer: the better of two has the larger.

    Rows are pairs, as for preferences. Rows to score have the prompt in its column and the answer in the
    column ``answer``, or whole conversations.

    Source: Ouyang et al., 2022, "Training language models to follow instructions", equation 1.
    """

    name = "reward"
    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    best_metric = "accuracy"
    sequences = 2

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the columns."""
        if data.labels or data.label or data.verdict:
            raise ConfigError(
                "reward learns from pairs of answers; leave out data.labels, data.label and data.verdict"
            )
        data = find_pairs(splits.train, data)
        pairs = pairs_of(splits.train, data, "the training rows")
        return as_answered([pair.chosen for pair in pairs], data)

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
        """Tokenize prompt and answer as one text; one too long loses the start of its prompt first."""
        limit = min(max_length, tokenizer.model_max_length)
        if not labelled:

            def one(given: tuple[Said, Said, Tools]) -> tuple[list[int], int]:
                prompt, answer, tools = given
                return self.layout(tokenizer, prompt, answer, tools, data.separator, limit)

            whole = read_each(answered_of(rows, data, ANSWER, where), one, where)
            columns = {"input_ids": [ids for ids, _ in whole]}
            columns["attention_mask"] = [[1] * len(ids) for ids, _ in whole]
            lengths = [length for _, length in whole]
        else:

            def both(pair: Pair) -> list[tuple[list[int], int]]:
                return [
                    self.layout(tokenizer, pair.prompt, answer, pair.tools, data.separator, limit)
                    for answer in (pair.chosen, pair.rejected)
                ]

            read = read_each(pairs_of(rows, data, where), both, where)
            chosen, rejected = ([row[side] for row in read] for side in (0, 1))
            columns = {"chosen_ids": [ids for ids, _ in chosen], "rejected_ids": [ids for ids, _ in rejected]}
            lengths = [max(one, other) for (_, one), (_, other) in zip(chosen, rejected, strict=True)]
        features = Dataset.from_dict({**columns, "length": [min(length, limit) for length in lengths]})
        return Encoded(features, sum(length > limit for length in lengths), max(lengths), lengths=lengths)

    @staticmethod
    def layout(
        tokenizer: PreTrainedTokenizerBase,
        prompt: Said,
        answer: Said,
        tools: Tools,
        separator: str,
        limit: int,
    ) -> tuple[list[int], int]:
        """The tokens of a prompt and its answer, cut to a limit, and their number before."""
        before, after = answer_tokens(tokenizer, prompt, answer, tools, separator)
        cut, (kept,) = fitted(before, [after], limit)
        return cut + kept, len(before) + len(after)

    def notes(self, rows: Dataset, data: DataConfig) -> list[str]:
        """The form of the rows."""
        prompt = " + ".join(prompt_columns(data)) or "what both begin with"
        return [f"its rows are pairs of answers ({prompt} → {data.chosen} over {data.rejected})"]

    def columns(self, data: DataConfig) -> list[str]:
        """Columns that are read of a row."""
        named = (*prompt_columns(data), data.chosen, data.rejected, data.tools)
        return [name for name in named if name is not None]

    def inputs(self, data: DataConfig) -> list[str]:
        """The prompt, where there is one, and the answer."""
        prompt = data.text or ("prompt" if data.messages else None)
        return [*([prompt] if prompt else []), ANSWER]

    def head(self, data: DataConfig) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pad rows to score to the longest of the batch."""
        return DataCollatorWithPadding(padded_right(tokenizer))

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """None but those that the trainer computes."""
        return {}

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """The number."""
        return [{"reward": float(row[0])} for row in logits_of(outputs)]

    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """A row for each text: a prompt and an answer with a tab between, or an answer alone."""
        return split_pairs(texts, self.inputs(data))
