"""A row as the model sees it: its tokens as text again, in stretches that are learned or are not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorica.train.settings import DataConfig
from lorica.train.tasks import Task

_IGNORED = -100


@dataclass(frozen=True)
class Stretch:
    """Some tokens of a row.

    Args:
        text: their text, special tokens included.
        learned: whether they are targets.
    """

    text: str
    learned: bool


@dataclass(frozen=True)
class Seen:
    """A row as the model sees it.

    Args:
        tokens: tokens that it reads; 0 where it reads none.
        learned: number of these that are targets.
        stretches: the text, in order.
        answer: the target of the row as a whole, such as its class, where that is no text of its own.
    """

    tokens: int
    learned: int
    stretches: tuple[Stretch, ...]
    answer: str | None = None

    def marked(self, before: str = "⟦", after: str = "⟧") -> str:
        """The text, with marks around its targets."""
        parts = (before + each.text + after if each.learned else each.text for each in self.stretches)
        return "".join(parts)


def seen(task: Task, features: dict[str, Any], tokenizer: Any, data: DataConfig) -> Seen:
    """A row as the model sees it.

    Args:
        task: the task that reads it.
        features: one row of the encoded ones.
        tokenizer: the model's.
        data: columns and labels, resolved.
    """
    ids: Sequence[int] | None = features.get("input_ids")
    if ids is None:  # an image
        return Seen(0, 0, (), _named(features.get("labels"), data))
    labels = features.get("labels")
    if task.writes and isinstance(labels, list):
        if task.name == "seq2seq-lm" or len(labels) != len(ids):
            read, written = Stretch(text_of(tokenizer, ids), False), Stretch(text_of(tokenizer, labels), True)
            return Seen(len(ids), len(labels), (read, Stretch(" → ", False), written))
        mask = [place > 0 and label != _IGNORED for place, label in enumerate(labels)]
        return Seen(len(ids), sum(mask), _stretches(tokenizer, ids, mask))
    if "start_positions" in features:
        first, last = features["start_positions"], features["end_positions"]
        answered = last >= first > 0
        mask = [answered and first <= place <= last for place in range(len(ids))]
        return Seen(
            len(ids), sum(mask), _stretches(tokenizer, ids, mask), None if answered else "no answer in it"
        )
    if isinstance(labels, list) and len(labels) == len(ids) and data.labels:
        mask = [label != _IGNORED for label in labels]
        classes = [data.labels[label] for label in labels if label != _IGNORED]
        return Seen(len(ids), sum(mask), _stretches(tokenizer, ids, mask), " ".join(classes))
    return Seen(len(ids), 0, (Stretch(text_of(tokenizer, ids), False),), _named(labels, data))


def _stretches(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> tuple[Stretch, ...]:
    runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return tuple(Stretch(text_of(tokenizer, [token for token, _ in run]), learned) for learned, run in runs)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, special ones included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _named(label: Any, data: DataConfig) -> str | None:
    """A label as its name, or the names of several."""
    if label is None:
        return None
    if isinstance(label, list):
        names = data.labels or [str(place) for place in range(len(label))]
        return ", ".join(name for name, value in zip(names, label, strict=False) if value) or "none"
    return data.labels[label] if data.labels and isinstance(label, int) else str(label)
