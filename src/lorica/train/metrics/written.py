"""The metrics of written text by name, as a recipe names them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from lorica.errors import ConfigError, nearest
from lorica.train.metrics.captions import cider, meteor, rouge_l
from lorica.train.metrics.jars import has_java
from lorica.train.metrics.ngrams import bleu, nist, ter
from lorica.train.metrics.question_answering import exact_match, f1
from lorica.train.metrics.rouge import rouge
from lorica.train.metrics.sql import logical_form

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
        ConfigError: naming it, and what to do.
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
        What each metric returns, together.

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
