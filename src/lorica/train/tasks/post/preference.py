"""Preferences: pairs of answers to a prompt, or answers that were judged alone."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorica.errors import ConfigError
from lorica.train.data.forms import Judged, Pair, find_judged, find_pairs, judged_of, pairs_of
from lorica.train.data.forms.messages import alike
from lorica.train.data.rows import read_each
from lorica.train.data.splits import Splits
from lorica.train.settings import FREE, JUDGED, PAIRED, DataConfig
from lorica.train.tasks.base import Encoded
from lorica.train.tasks.causal_lm import CausalLanguageModelling
from lorica.train.tasks.post.answers import PostTask, answer_tokens, as_answered, fitted, prompts_to_answer


class Preference(PostTask, CausalLanguageModelling):
    """Learns to prefer the better of two answers, or the wanted ones, against the adapter's own start.

    - Pairs: a prompt (``data.text``), the better answer (``data.chosen``) and the worse (``data.rejected``).
    - Judged answers: a prompt, an answer (``data.label``) and whether it is wanted (``data.verdict``).

    Sources: Rafailov et al., 2023, "Direct Preference Optimization"; Ethayarajh et al., 2024, "KTO".
    """

    name = "preference"
    losses = (*PAIRED, *JUDGED, *FREE)
    keeps_start = True
    packs = False
    sequences = 2  # the two answers; of judged answers, another's, from which KTO estimates the KL

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the columns."""
        rows, loss = splits.train, self.post.loss
        if data.labels:
            raise ConfigError(f"{self.name} has no classes; leave out data.labels, not {data.labels}")
        if data.verdict is None and (data.chosen is not None or self._holds_pairs(rows)):
            data = find_pairs(rows, data)
            return as_answered([pair.chosen for pair in pairs_of(rows, data, "the training rows")], data)
        if loss is not None and loss not in JUDGED:
            find_pairs(rows, data)
            raise ConfigError(f"post.loss {loss!r} needs pairs of answers; data.verdict belongs to 'kto'")
        data = find_judged(rows, data)
        return as_answered([each.answer for each in judged_of(rows, data, "the training rows")], data)

    @staticmethod
    def _holds_pairs(rows: Dataset) -> bool:
        try:
            find_pairs(rows, DataConfig())
        except ConfigError:
            return False
        return True

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
        """Tokenize; a row too long loses the start of its prompt first, then the ends of its answers.

        Judged answers, and pairs under a loss of judged answers, give a row of features for each answer.
        """
        limit = min(max_length, tokenizer.model_max_length)
        if data.verdict is not None:

            def judged(each: Judged) -> tuple[list[int], list[int], bool]:
                said = answer_tokens(tokenizer, each.prompt, each.answer, each.tools, data.separator)
                return *said, each.wanted

            return _judged(read_each(judged_of(rows, data, where), judged, where), limit, len(rows))

        def apart(pair: Pair) -> tuple[list[int], list[int], list[int]]:
            return self._pair(tokenizer, pair, data.separator)

        pairs = read_each(pairs_of(rows, data, where), apart, where)
        if self.post.loss in JUDGED:
            each = [(pair[0], answer, i == 0) for pair in pairs for i, answer in enumerate(pair[1:])]
            return _judged(each, limit, len(rows))
        lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in pairs]
        cut = [fitted(prompt, answers, limit) for prompt, *answers in pairs]
        columns = {
            "prompt_ids": [prompt for prompt, _ in cut],
            "chosen_ids": [answers[0] for _, answers in cut],
            "rejected_ids": [answers[1] for _, answers in cut],
            "length": [len(prompt) + max(map(len, answers)) for prompt, answers in cut],
        }
        return _encoded(columns, lengths, limit, len(rows))

    @staticmethod
    def _pair(tokenizer: Any, pair: Pair, separator: str) -> tuple[list[int], list[int], list[int]]:
        (one, chosen), (other, rejected) = (
            answer_tokens(tokenizer, pair.prompt, answer, pair.tools, separator)
            for answer in (pair.chosen, pair.rejected)
        )
        shared = alike(one, other)  # a template may lay out a prompt by what follows it
        return one[:shared], one[shared:] + chosen, other[shared:] + rejected

    def notes(self, rows: Dataset, data: DataConfig) -> list[str]:
        """The form of the rows."""
        prompt = " + ".join(self.inputs(data)) or "what both begin with"
        if data.verdict is None:
            return [f"its rows are pairs of answers ({prompt} → {data.chosen} over {data.rejected})"]
        answer = data.label or "its last turn"
        return [f"its rows are judged answers ({prompt} → {answer}, by {data.verdict})"]

    def columns(self, data: DataConfig) -> list[str]:
        """Columns that are read of a row."""
        named = (data.chosen, data.rejected, data.label, data.verdict, data.tools)
        return [*self.inputs(data), *(name for name in named if name is not None)]

    def prompts(
        self, rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
    ) -> list[list[int]]:
        """The prompt and the separator; a conversation up to where the assistant speaks."""
        return prompts_to_answer(rows, data, tokenizer, where)


def _judged(found: list[tuple[list[int], list[int], bool]], limit: int, rows: int) -> Encoded:
    lengths = [len(prompt) + len(answer) for prompt, answer, _ in found]
    cut = [fitted(prompt, [answer], limit) for prompt, answer, _ in found]
    columns = {
        "prompt_ids": [prompt for prompt, _ in cut],
        "completion_ids": [answers[0] for _, answers in cut],
        "label": [wanted for *_, wanted in found],
        "length": [len(prompt) + len(answers[0]) for prompt, answers in cut],
    }
    return _encoded(columns, lengths, limit, rows)


def _encoded(columns: dict[str, list[Any]], lengths: list[int], limit: int, rows: int) -> Encoded:
    truncated = sum(length > limit for length in lengths)
    return Encoded(Dataset.from_dict(columns), truncated, max(lengths), rows=rows, lengths=lengths)
