"""BLEU, NIST and TER: how far a text's words, and runs of words, are those of its references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from lorica.errors import require


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of n-grams that a reference has too, up to four, over the whole set (Papineni et al., 2002).

    By sacrebleu, as mteval-v13a computes it for the E2E challenge: its tokens, in lower case, against the
    reference closest in length.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right.

    Returns:
        ``bleu``, from 0 to 1.
    """
    scorer = require("sacrebleu.metrics", extra="generation").BLEU(lowercase=True)
    return {"bleu": scorer.corpus_score(list(predictions), _streams(references)).score / 100}


def ter(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Edits that make a text its nearest reference, for each word of it (Snover et al., 2006).

    By sacrebleu, as tercom computes it: in lower case, words as spaces part them, shifts of phrases as one
    edit.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right.

    Returns:
        ``ter``, from 0; may pass 1.
    """
    scorer = require("sacrebleu.metrics", extra="generation").TER()
    return {"ter": scorer.corpus_score(list(predictions), _streams(references)).score / 100}


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]], n: int = 5) -> dict[str, float]:
    """N-grams that a reference has too, each by the bits it tells (Doddington, 2002, equation 3).

    As mteval-v13a computes it, in its tokens and lower case: matches are clipped by all references of a row
    together, and lengths compared with their mean. NLTK's takes each row's best reference alone.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right.
        n: longest n-gram.

    Returns:
        ``nist``, from 0; how much a set can reach depends on its references.
    """
    said = list(_tokens(predictions))
    true = [list(_tokens(texts)) for texts in references]
    known: Counter[tuple[str, ...]] = Counter()
    for text in (text for texts in true for text in texts):
        known[()] += len(text)
        for order in range(1, n + 1):
            known.update(_ngrams(text, order))
    score = 0.0
    for order in range(1, n + 1):
        told, total = 0.0, 0
        for text, texts in zip(said, true, strict=True):
            counts = Counter(_ngrams(text, order))
            allowed: Counter[tuple[str, ...]] = Counter()
            for other in texts:
                allowed |= Counter(_ngrams(other, order))
            told += sum(
                hits * math.log2(known[ngram[:-1]] / known[ngram])
                for ngram, hits in (counts & allowed).items()
            )
            total += counts.total()
        score += told / total if total else 0.0
    length = sum(map(len, said))
    due = sum(sum(map(len, texts)) / len(texts) for texts in true)
    return {"nist": score * _brevity(length / due if due else 0.0)}


def _brevity(ratio: float) -> float:
    """1 for texts as long as their references, one half at two thirds of that."""
    if ratio >= 1:
        return 1.0
    return math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2) if ratio > 0 else 0.0


def _ngrams(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _tokens(texts: Sequence[str]) -> Iterable[list[str]]:
    tokenizer = require("sacrebleu.tokenizers.tokenizer_13a", extra="generation").Tokenizer13a()
    return (tokenizer(text.strip()).lower().split() for text in texts)


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The first reference of every row, then every second one: None where a row has fewer."""
    longest = max(map(len, references))
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(longest)]
