"""Scores of answers to questions on a text, as SQuAD counts them (Rajpurkar et al., 2016 and 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def question_answering(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score answers against those that people gave.

    Args:
        answers: an answer a question, "" for none.
        references: the right answers to each question, of which the best match counts; none for a question
            that its text does not answer.

    Returns:
        ``exact_match``, the share of answers that are right to the word, without regard to case, punctuation
        and articles; ``f1``, the mean overlap of words. Where some questions have no answer, also ``f1`` of
        the two kinds apart: ``f1_answerable`` and ``f1_unanswerable``.
    """
    pairs = [
        (said, [text for text in texts if normalised(text)])
        for said, texts in zip(answers, references, strict=True)
    ]
    exact = [max(normalised(said) == normalised(text) for text in texts or [""]) for said, texts in pairs]
    overlap = np.array([max(_overlap(said, text) for text in texts or [""]) for said, texts in pairs])
    scores = {"exact_match": float(np.mean(exact)), "f1": float(overlap.mean())}
    answerable = np.array([bool(texts) for _, texts in pairs])
    if answerable.any() and not answerable.all():
        scores["f1_answerable"] = float(overlap[answerable].mean())
        scores["f1_unanswerable"] = float(overlap[~answerable].mean())
    return scores


def normalised(text: str) -> str:
    """A text in lower case, without punctuation and articles, its words a space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _overlap(said: str, right: str) -> float:
    ours, theirs = normalised(said).split(), normalised(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    # The harmonic mean of precision and recall.
    return 2 * same / (len(ours) + len(theirs))
