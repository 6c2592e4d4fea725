"""Scores of written text by name, as a recipe names them: runs of words, summaries, answers, queries."""

from __future__ import annotations

import importlib.util
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lorica.errors import ConfigError, nearest, require
from lorica.train.metrics.captions import cider, has_java, meteor, rouge_l

_ARTICLES = re.compile(r"\b(a|an|the)\b")

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def question_answering(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score answers against those that people gave.

    Args:
        answers: one per question, "" for none.
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


_QUERY = re.compile(
    r"select (?:(max|min|count|sum|avg)(?: \(?|\())?(.+?)\)? from table(?: where (.+?))?\s*;?", re.DOTALL
)

_CONDITION = re.compile(r"(.+?) ?([=<>]) ?(.+)", re.DOTALL)


def logical_form(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of queries that say what a reference says, without running them (Zhong et al., 2017).

    The aggregate, the column and the conditions must be the same; the conditions' order, the case of letters
    and spaces do not matter. A text that is no such query is compared as a text.

    Args:
        predictions: (rows,) queries: ``SELECT [MAX|MIN|COUNT|SUM|AVG] column FROM table
            [WHERE column =|<|> value AND ...]``.
        references: (rows,) one or more that would be right.

    Returns:
        ``logical_form``, from 0 to 1.
    """
    right = [
        _parsed(said) in [_parsed(each) for each in true]
        for said, true in zip(predictions, references, strict=True)
    ]
    return {"logical_form": sum(right) / len(right)}


def _parsed(query: str) -> tuple[object, ...]:
    plain = " ".join(query.lower().split())
    found = _QUERY.fullmatch(plain)
    if found is None:
        return (plain,)
    aggregate, column, rest = found.groups()
    conditions: list[str] = []
    for part in rest.split(" and ") if rest else []:
        # "rock and roll" is a value, not two conditions.
        if conditions and not _CONDITION.fullmatch(part):
            conditions[-1] += f" and {part}"
        else:
            conditions.append(part)
    parts = [match.groups() if (match := _CONDITION.fullmatch(part)) else part for part in conditions]
    return aggregate, column, frozenset(Counter(parts).items())


Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]

METRICS: dict[str, Metric] = {
    "bleu": bleu,
    "nist": nist,
    "ter": ter,
    "rouge": rouge,
    "meteor": meteor,
    "rouge_l": rouge_l,
    "cider": cider,
    "exact_match": exact_match,
    "f1": f1,
    "logical_form": logical_form,
}

_JAVA = ("meteor", "rouge_l", "cider")

_LIBRARIES = {
    "bleu": "sacrebleu",
    "nist": "sacrebleu",
    "ter": "sacrebleu",
    "rouge": "rouge_score",
    "meteor": "pycocoevalcap",
    "rouge_l": "pycocoevalcap",
    "cider": "pycocoevalcap",
}


def check(names: Sequence[str]) -> None:
    """Refuse metrics that do not exist, or whose library is not installed.

    Raises:
        ConfigError: naming it, and the way to mend it.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(
                f"there is no metric {name!r} of written text{nearest(name, METRICS)}; there are: "
                f"{', '.join(METRICS)}"
            )
        library = _LIBRARIES.get(name)
        if library is not None and importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"the metric {name!r} needs {library}; it comes with: pip install 'lorica[generation]'"
            )


def without_java(names: Sequence[str]) -> list[str]:
    """Those of the metrics that this machine cannot compute, because it has no Java."""
    return [] if has_java() else [name for name in names if name in _JAVA]


def written(
    predictions: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str]
) -> dict[str, float]:
    """Score texts against their references, over the whole set.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right.
        names: keys of `METRICS`. Those that need Java are left out where there is none; see `without_java`.

    Returns:
        All that the metrics return, in one dictionary.

    Raises:
        ConfigError: a name is unknown, its library missing, or a row has no reference.
    """
    check(names)
    if len(predictions) != len(references) or not len(predictions):
        raise ConfigError(
            f"{len(predictions)} texts cannot be scored by {len(references)} rows of references"
        )
    empty = next((row for row, texts in enumerate(references) if not len(texts)), None)
    if empty is not None:
        raise ConfigError(f"row {empty + 1} has no reference to score its text by")
    scores: dict[str, float] = {}
    for name in names:
        if name not in without_java([name]):
            scores |= METRICS[name](predictions, references)
    return scores
