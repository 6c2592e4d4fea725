"""ROUGE: how much of a reference a summary has, by rouge-score."""

from __future__ import annotations

from collections.abc import Sequence

from lorica.errors import require


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """F-measure of words, pairs of words and the longest common subsequence (Lin, 2004), words stemmed.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right; the best of a row counts.

    Returns:
        ``rouge1``, ``rouge2`` and ``rougeL``, from 0 to 1: means over the rows.
    """
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = require("rouge_score.rouge_scorer", extra="generation").RougeScorer(names, use_stemmer=True)
    rows = [scorer.score_multi(list(true), said) for said, true in zip(predictions, references, strict=True)]
    return {name: sum(row[name].fmeasure for row in rows) / len(rows) for name in names}
