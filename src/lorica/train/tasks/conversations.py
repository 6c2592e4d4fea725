"""A conversation as tokens: what the assistant says, and everything else."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from lorica.errors import ConfigError
from lorica.train.rows import Unusable
from lorica.train.tasks.messages import ASSISTANT, LEARNED, learned


def conversation_pieces(tokenizer: PreTrainedTokenizerBase, messages: Any) -> list[tuple[list[int], bool]]:
    """Lay out a conversation by the tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: dictionaries of ``role`` and ``content``, in order, as `as_messages` makes them.

    Returns:
        Stretches of tokens in order, each with whether the assistant says them, and they are learned.

    Raises:
        ConfigError: the tokenizer has no chat template.
        Unusable: nobody answers as the assistant, or the template refuses them or
            rewrites earlier turns of theirs.
    """
    _check_template(tokenizer)
    if not any(map(learned, messages)):
        raise Unusable("has no message of the role 'assistant', so there is nothing to learn")
    pieces: list[tuple[str, bool]] = []
    done = ""
    said = [{key: value for key, value in message.items() if key != LEARNED} for message in messages]
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        # No template lays out a conversation of nothing.
        before = _laid_out(tokenizer, said[:i], add_generation_prompt=True) if i else ""
        after = _laid_out(tokenizer, said[: i + 1])
        if not (before.startswith(done) and after.startswith(before)):
            raise Unusable(
                f"is laid out otherwise with each message: the chat template of {tokenizer.name_or_path!r} "
                "changes earlier turns when one is added, so which tokens are the assistant's cannot be "
                "told; give one answer a row, as prompt and completion"
            )
        pieces += [(before[len(done) :], False), (after[len(before) :], learned(message))]
        done = after
    return [
        (list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), target)
        for text, target in pieces
    ]


def conversation_prompt(tokenizer: PreTrainedTokenizerBase, messages: Any) -> list[int]:
    """Lay out a conversation up to where the assistant speaks next.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: dictionaries of ``role`` and ``content``, in order, as `as_messages` makes them; an
            assistant's answer at the end is left out.

    Raises:
        ConfigError: the tokenizer has no chat template.
        Unusable: there is nothing before the answer.
    """
    _check_template(tokenizer)
    said = messages[:-1] if messages[-1]["role"] == ASSISTANT else messages
    if not said:
        raise Unusable("has nothing that the assistant could answer")
    text = _laid_out(tokenizer, said, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _laid_out(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise Unusable(f"is refused by the chat template: {error}") from error


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template to lay out messages; take an "
            "instruction-tuned model's, set its chat_template, or give prompts and completions instead"
        )
