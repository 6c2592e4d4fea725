"""Scores of names in text, whole spans at a time, by seqeval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorica.errors import require

OUTSIDE = "O"


def marks_spans(names: Sequence[str]) -> bool:
    """Whether classes of words say which words belong together: IOB, BIO2 or IOBES."""
    inside = [name for name in names if name != OUTSIDE]
    return bool(inside) and all(name[:2] in ("B-", "I-", "E-", "S-") and len(name) > 2 for name in inside)


def seqeval() -> Any:
    """The library's module of metrics.

    Raises:
        MissingExtra: it is not installed.
    """
    return require("seqeval.metrics.sequence_labeling", extra="train")


def tagging(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compare tagged spans with the true ones: a span counts where its kind and both its ends are right.

    Args:
        predictions: (rows, words) a tag for each word, such as ``B-PER``, ``I-PER`` and ``O``.
        labels: (rows, words) the true tags.

    Returns:
        ``f1``, ``precision`` and ``recall`` over all spans of the set, as CoNLL-2000's script counts them;
        ``accuracy``, the share of words whose tag is right.
    """
    said, true = [list(row) for row in predictions], [list(row) for row in labels]
    precision, recall, f1, _ = seqeval().precision_recall_fscore_support(
        true, said, average="micro", zero_division=0
    )
    accuracy = seqeval().accuracy_score(true, said)
    scores = {"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy}
    return {name: float(score) for name, score in scores.items()}


def spans(tags: Sequence[str]) -> list[dict[str, Any]]:
    """The tagged spans of a text, in order.

    Args:
        tags: (words,) a tag for each word.

    Returns:
        ``label``, such as ``PER``, and the places of the words from ``start`` up to, not including, ``end``.
    """
    return [
        {"label": label, "start": first, "end": last + 1}
        for label, first, last in seqeval().get_entities(list(tags))
    ]
