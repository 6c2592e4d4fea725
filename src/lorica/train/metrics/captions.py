"""METEOR, ROUGE-L and CIDEr as coco-caption defines them, which is how the E2E challenge scores.

All three read texts as the Penn Treebank splits them, in lower case and without punctuation. What splits them
so is a Java program, and so is METEOR.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorica.errors import require
from lorica.train.metrics.jars import meteor_15, ptb_tokens


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """METEOR 1.5 (Denkowski and Lavie, 2014): words, stems, synonyms and paraphrases, in order.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right; the best of a row counts.

    Returns:
        ``meteor``, from 0 to 1, of all matches of the set together.
    """
    return {"meteor": meteor_15(*_split(predictions, references))}


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-L as coco-caption has it: recall weighs 1.44 times precision, the best of each over a row.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right.

    Returns:
        ``rouge_l``, from 0 to 1, the mean over rows.
    """
    return {"rouge_l": _coco("rouge.rouge", "Rouge", predictions, references)}


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D (Vedantam et al., 2015): n-grams weighed by how few rows have them, compared by their cosine.

    Args:
        predictions: (rows,) texts.
        references: (rows,) one text or more that would be right.

    Returns:
        ``cider``, from 0 to 10, the mean over rows.
    """
    return {"cider": _coco("cider.cider", "Cider", predictions, references)}


def _coco(module: str, name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    scorer = getattr(require(f"pycocoevalcap.{module}", extra="generation"), name)()
    said, true = _split(predictions, references)
    score, _ = scorer.compute_score(dict(enumerate(true)), {i: [text] for i, text in enumerate(said)})
    return float(score)


def _split(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    # In one call: the program takes longer to start than to split a test set.
    words = iter(ptb_tokens([*predictions, *(text for texts in references for text in texts)]))
    return [next(words) for _ in predictions], [[next(words) for _ in texts] for texts in references]
