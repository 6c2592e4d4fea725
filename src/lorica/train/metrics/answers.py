"""Scores of answers, as SQuAD counts them (Rajpurkar et al., 2016 and 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

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
        ``exact_match`` and ``f1``, as the functions of these names give them. Where some questions have no
        answer, also ``f1`` of the two kinds apart: ``f1_answerable`` and ``f1_unanswerable``.
    """
    overlap = np.array(_best(_overlap, answers, references))
    scores = {**exact_match(answers, references), "f1": float(overlap.mean())}
    answerable = np.array([any(map(normalised, texts)) for texts in references])
    if answerable.any() and not answerable.all():
        scores["f1_answerable"] = float(overlap[answerable].mean())
        scores["f1_unanswerable"] = float(overlap[~answerable].mean())
    return scores


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of texts that are one of their references, without regard to case, punctuation and articles.

    Args:
        predictions: (rows,) texts.
        references: (rows,) the texts that would be right.

    Returns:
        ``exact_match``, from 0 to 1.
    """
    return {"exact_match": float(np.mean(_best(_same, predictions, references)))}


def f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean overlap of a text's words with those of its nearest reference: twice the shared of all words.

    Args:
        predictions: (rows,) texts.
        references: (rows,) the texts that would be right.

    Returns:
        ``f1``, from 0 to 1.
    """
    return {"f1": float(np.mean(_best(_overlap, predictions, references)))}


def normalised(text: str) -> str:
    """A text in lower case, without punctuation and articles, its words a space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _best(
    score: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    """Each text's score by the reference that is best for it; by an empty one where none has a word."""
    return [
        max(score(said, text) for text in [text for text in texts if normalised(text)] or [""])
        for said, texts in zip(predictions, references, strict=True)
    ]


def _same(said: str, right: str) -> float:
    return float(normalised(said) == normalised(right))


def _overlap(said: str, right: str) -> float:
    ours, theirs = normalised(said).split(), normalised(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    # The harmonic mean of precision and recall.
    return 2 * same / (len(ours) + len(theirs))
