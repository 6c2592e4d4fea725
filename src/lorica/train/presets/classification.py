"""GLUE's eight tasks, and film reviews.

GLUE's test rows have no labels, so its scores are those of the validation rows. The metric that decides is
the one that the LoRA paper reports (section 5.2): Matthews for CoLA, Pearson for STS-B, accuracy for the
others.
"""

from __future__ import annotations

from typing import Any

from lorica.train.presets.base import Preset, register

_CLASSES = "sequence-classification"

_ENTAILED = ["entailment", "not_entailment"]

_MNLI = ["entailment", "neutral", "contradiction"]


def _glue(name: str, about: str, columns: tuple[str, ...], labels: list[str] | None, **data: Any) -> None:
    task, metric = (_CLASSES, "accuracy") if labels else ("regression", "pearson")
    register(
        f"glue/{name}",
        Preset(
            f"GLUE: {about}",
            task,
            {
                "train": "nyu-mll/glue",
                "subset": name.partition("_")[0],
                **dict(zip(("text", "text_pair"), columns, strict=False)),
                "labels": labels,
                **data,
            },
            {"metric_for_best": "matthews" if name == "cola" else metric},
        ),
    )


_glue("cola", "is a sentence grammatical?", ("sentence",), ["unacceptable", "acceptable"])

_glue("sst2", "is a sentence of a film review positive?", ("sentence",), ["negative", "positive"])

_glue(
    "mrpc",
    "do two sentences say the same?",
    ("sentence1", "sentence2"),
    ["not_equivalent", "equivalent"],
)

_glue("stsb", "how alike are two sentences, from 0 to 5?", ("sentence1", "sentence2"), None)

_glue(
    "qqp",
    "do two questions ask the same?",
    ("question1", "question2"),
    ["not_duplicate", "duplicate"],
)

_glue(
    "mnli", "does one sentence follow from another? Scored on known genres", ("premise", "hypothesis"), _MNLI
)

_glue(
    "mnli_mismatched",
    "does one sentence follow from another? Scored on unknown genres",
    ("premise", "hypothesis"),
    _MNLI,
    validation="nyu-mll/glue#validation_mismatched",
)

_glue("qnli", "does a sentence hold the answer to a question?", ("question", "sentence"), _ENTAILED)

_glue("rte", "does one sentence follow from another?", ("sentence1", "sentence2"), _ENTAILED)

register(
    "rotten_tomatoes",
    Preset(
        "is a sentence of a film review positive?",
        _CLASSES,
        {
            "train": "cornell-movie-review-data/rotten_tomatoes",
            "text": "text",
            "labels": ["negative", "positive"],
        },
    ),
)
