"""Rows of post-training: a prompt and two answers, an answer that was judged, or a prompt alone."""

from __future__ import annotations

from typing import Any

from lorica.train.preview.seen import Seen, Stretch, text_of
from lorica.train.settings import DataConfig
from lorica.train.tasks.post.answers import PostTask, question_tokens
from lorica.train.tasks.post.grouped import PROMPT, Grouped
from lorica.train.tasks.post.reward import Reward

INSTEAD = "\n  instead of "
"""Text between the better answer and the worse on the screen."""


def seen_answers(task: PostTask, features: dict[str, Any], tokenizer: Any, data: DataConfig) -> Seen:
    """A row as the model sees it; of two answers each is read after the prompt.

    Args:
        task: what reads it.
        features: one row of the encoded ones.
        tokenizer: the model's.
        data: columns, resolved.
    """
    if isinstance(task, Grouped):
        ids = question_tokens(tokenizer, features[PROMPT], None, data.separator)
        ids = ids[-task.limit(tokenizer) :]
        most = task.post.max_new_tokens
        told = f"{task.copies} answers of up to {most:,} tokens, written in training"
        return Seen(len(ids), 0, (Stretch(text_of(tokenizer, ids), False),), told)
    prompt = features.get("prompt_ids", [])
    asked = [Stretch(text_of(tokenizer, prompt), False)] if prompt else []
    names = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in features]
    answers = [features[name] for name in names]
    # A reward model learns a number for the whole, and no token of it.
    counted = not isinstance(task, Reward)
    said = [Stretch(text_of(tokenizer, ids), counted) for ids in answers]
    read = sum(len(prompt) + len(ids) for ids in answers)
    learned = sum(map(len, answers)) if counted else 0
    if "completion_ids" in features:
        return Seen(read, learned, (*asked, *said), "wanted" if features["label"] else "not wanted")
    return Seen(read, learned, (*asked, said[0], Stretch(INSTEAD, False), said[1]))


def balance_of(features: Any) -> dict[str, int]:
    """Numbers of judged answers that are wanted and not wanted; empty for other rows.

    Args:
        features: encoded rows.
    """
    if "completion_ids" not in features.column_names:
        return {}
    labels = features["label"][:]
    return {"wanted": sum(labels), "not wanted": len(labels) - sum(labels)}


def learned_of(task: PostTask, features: Any) -> int:
    """Tokens of answers that are learned."""
    if isinstance(task, Reward):
        return 0
    names = [n for n in ("chosen_ids", "rejected_ids", "completion_ids") if n in features.column_names]
    return sum(len(ids) for name in names for ids in features[name])
