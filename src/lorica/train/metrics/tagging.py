"""Scores of names in text, whole spans at a time, by seqeval."""

from __future__ import annotations

from collections.abc import Sequence

from lorica.errors import require


def tagging(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compare tagged spans with the true ones: a span counts where its kind and both its ends are right.

    Args:
        predictions: (rows, words) a tag for each word, such as ``B-PER``, ``I-PER`` and ``O``.
        labels: (rows, words) the true tags.

    Returns:
        ``span_f1``, ``span_precision`` and ``span_recall`` over all spans of the set, as CoNLL-2000's script
        counts them.
    """
    seqeval = require("seqeval.metrics", extra="generation")
    said, true = [list(row) for row in predictions], [list(row) for row in labels]
    return {
        f"span_{name}": float(getattr(seqeval, f"{name}_score")(true, said, zero_division=0))
        for name in ("f1", "precision", "recall")
    }
