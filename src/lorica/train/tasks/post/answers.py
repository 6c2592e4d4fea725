"""Prompts and answers as tokens, laid out as a causal language model learns and continues them.

texts      prompt, `data.separator`, answer, end of text
messages   the tokenizer's chat template; the answer begins where the assistant speaks
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorica.config.inits import FROM_DATA
from lorica.errors import ConfigError
from lorica.train.data.forms import Said, asked_of
from lorica.train.data.forms.messages import LEARNED, Message, Tools
from lorica.train.data.rows import Unusable, read_each
from lorica.train.settings import DataConfig, PostConfig
from lorica.train.tasks.base import Task
from lorica.train.tasks.causal_lm import completion_pieces, prompt_tokens
from lorica.train.tasks.conversations import conversation_pieces, conversation_prompt

if TYPE_CHECKING:
    from lorica.train.recipe import Recipe


class PostTask(Task):
    """A task that TRL's trainers carry; the recipe's part ``post`` says how.

    Attributes:
        losses: those that it knows.
        post: the recipe's.
    """

    losses: ClassVar[tuple[str, ...]] = ()
    reads_outputs = groups_lengths = False
    carrier = "lorica.train.post.making"
    libraries = ("trl",)
    post: PostConfig = PostConfig()

    def settled(self, recipe: Recipe) -> Self:
        """The task with what a recipe says of it.

        Raises:
            ConfigError: it has settings of other tasks.
        """
        post = recipe.post
        if post.loss is not None and post.loss not in self.losses:
            known = f"one of {', '.join(self.losses)}" if self.losses else "left out"
            raise ConfigError(f"post.loss of the task {self.name} must be {known}, not {post.loss!r}")
        if recipe.generation.metrics:
            raise ConfigError(
                f"generation.metrics compare what is written with right texts, of which {self.name} has "
                "none; leave them out"
            )
        if recipe.data.template is not None or recipe.data.continues is not None:
            raise ConfigError(
                f"data.template and data.continues lay out texts for causal-lm; {self.name} reads prompts "
                "and answers from columns of their own"
            )
        if recipe.data.streaming:
            raise ConfigError(f"data.streaming is not for {self.name}: its rows are encoded before training")
        start = getattr(recipe.configuration(), "init_lora_weights", True)
        if start in FROM_DATA:
            raise ConfigError(
                f"init_lora_weights={start!r} looks at batches with targets, of which {self.name} has none; "
                "take another start, or begin from an adapter that started so (init_from)"
            )
        result = copy.copy(self)
        result.post = post
        return result


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Said, answer: Said, tools: Tools, separator: str
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those of an answer to it.

    Args:
        tokenizer: the model's.
        prompt: a text, or messages.
        answer: of the same kind.
        tools: those that messages may call.
        separator: text between two texts.

    Raises:
        Unusable: nothing of the answer is learned, or the chat template refuses the messages.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        pieces = completion_pieces(tokenizer, prompt, answer, separator if prompt else "")
    else:
        said: list[Any] = [*({**cast(Message, message), LEARNED: 0} for message in prompt), *answer]
        pieces = conversation_pieces(tokenizer, said, tools)
    first = next((place for place, (_, target) in enumerate(pieces) if target), None)
    if first is None:
        raise Unusable("has an answer of which the chat template shows nothing")
    before, after = ([token for ids, _ in part for token in ids] for part in (pieces[:first], pieces[first:]))
    return before, after


def fitted(prompt: list[int], answers: list[list[int]], limit: int) -> tuple[list[int], list[list[int]]]:
    """A prompt and its answers cut to a length: first the prompt's start, then the answers' ends."""
    longest = max(map(len, answers))
    # A target needs a token before it to be predicted from.
    cut = min(max(len(prompt) + longest - limit, 0), max(len(prompt) - 1, 0))
    prompt = prompt[cut:]
    return prompt, [answer[: max(limit - len(prompt), 1)] for answer in answers]


def prompts_to_answer(
    rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[list[int]]:
    """The tokens that a model answers, for each row: its prompt, whatever its other columns."""
    data = replace(data, text=data.text or "prompt")
    parts = {name: getattr(data, name) for name in ("text_pair", "system", "tools")}
    data = replace(data, **{name: None for name, column in parts.items() if column not in rows.column_names})
    return read_each(
        asked_of(rows, data, where),
        lambda asked: question_tokens(tokenizer, asked.prompt, asked.tools, data.separator),
        where,
    )


def question_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Said, tools: Tools, separator: str
) -> list[int]:
    """The tokens that a model goes on from: a text and the separator, or messages and how an answer opens."""
    if isinstance(prompt, str):
        return prompt_tokens(tokenizer, prompt, separator if prompt else "")
    said = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    return conversation_prompt(tokenizer, said, tools)


def as_answered(answers: list[Said], data: DataConfig) -> DataConfig:
    """The configuration with what the training rows' answers say of it.

    They are conversations where they are messages; there is no separator where those in text begin with white
    space of their own.
    """
    texts = [answer for answer in answers if isinstance(answer, str)]
    if len(texts) < len(answers):
        data = replace(data, messages=True)
    if data.separator == DataConfig().separator and texts and all(text[:1].isspace() for text in texts):
        return replace(data, separator="")
    return data
