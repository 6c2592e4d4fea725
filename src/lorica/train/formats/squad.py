"""SQuAD's own JSON: articles of paragraphs of questions, as rows of one question each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.errors import FileError


def is_squad(value: Mapping[str, Any]) -> bool:
    """Whether an object is a file of SQuAD's."""
    articles = value.get("data")
    return (
        isinstance(articles, list)
        and bool(articles)
        and all(isinstance(each, dict) and isinstance(each.get("paragraphs"), list) for each in articles)
    )


def squad_rows(articles: list[Any], path: Path) -> list[dict[str, Any]]:
    """A row for each question: ``id``, ``title``, ``context``, ``question`` and ``answers``.

    Questions that have no answer (version 2.0) get empty lists; answers that only look right are left out.

    Raises:
        FileError: a paragraph or a question lacks something.
    """
    rows: list[dict[str, Any]] = []
    for article in articles:
        for paragraph in article["paragraphs"]:
            try:
                context = paragraph["context"]
                for asked in paragraph["qas"]:
                    answers = [] if asked.get("is_impossible") else asked.get("answers")
                    rows.append(
                        {
                            "id": asked.get("id"),
                            "title": article.get("title"),
                            "context": context,
                            "question": asked["question"],
                            "answers": answers
                            if answers is None
                            else {
                                "text": [answer["text"] for answer in answers],
                                "answer_start": [answer["answer_start"] for answer in answers],
                            },
                        }
                    )
            except (KeyError, TypeError, AttributeError) as error:
                raise FileError(
                    f"{path} is no file of SQuAD's: after question {len(rows)}, a paragraph or a question "
                    f"lacks {error}"
                ) from error
    return rows
