"""JSON: one object per line, a list of objects, one object with the rows in it, or one that holds columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.errors import FileError
from lorica.train.data.tables import Found, Number, columns_of, table
from lorica.train.data.text import lines_of


class DuplicateKey(ValueError):
    """An object has a name twice."""


def read_objects(text: str, path: Path) -> dict[str | None, Found]:
    """Rows of a JSON file, by split; under None where it has no splits.

    A line may end with a comma, as of a list cut into lines; objects may run over several lines.

    Raises:
        FileError: it is no JSON, or JSON of another form.
    """
    lines = [(number, line) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    if not lines:
        raise FileError(f"{path} has no rows")
    first = _try(lines[0][1])
    if isinstance(first, dict) and (len(lines) > 1 or not _holds_rows(first)):
        return {None: _by_line(lines, path)}
    try:
        whole = _loads(text)
    except (ValueError, RecursionError) as error:
        objects = _one_after_another(text)
        if objects is None:
            raise FileError(f"cannot read {path} as json: {_told(error)}") from error
        whole = objects
    return _whole(whole, path)


def _by_line(lines: list[tuple[int, str]], path: Path) -> Found:
    rows: list[dict[str, Any]] = []
    broken: dict[int, str] = {}
    for place, (_, line) in enumerate(lines):
        try:
            value = _loads(line.strip().removesuffix(","))
        except (ValueError, RecursionError) as error:
            value, broken[place] = {}, f"is no JSON: {_told(error)}"
        if not isinstance(value, dict):
            value, broken[place] = {}, f"is a {_named(value)}, where an object ({{...}}) is due"
        rows.append(value)
    data, notes = table(columns_of(rows), path)
    return Found(data, [number for number, _ in lines], notes, broken)


def _whole(value: Any, path: Path) -> dict[str | None, Found]:
    if isinstance(value, list):
        return {None: _rows(value, path)}
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a {_named(value)}, where a list of objects is due")
    if is_squad(value):
        return {None: _rows(squad_rows(value["data"], path), path)}
    lists = {name: rows for name, rows in value.items() if _is_rows(rows)}
    if lists and len(lists) == len(value) and len(lists) > 1:
        return {name: _rows(rows, path) for name, rows in lists.items()}
    if len(lists) == 1:
        (name, rows), *_ = lists.items()
        found = _rows(rows, path)
        return {
            None: Found(found.rows, None, (f"its rows are those under {name!r}", *found.notes), found.broken)
        }
    if len(columns := _columns(value)) > 1:
        data, notes = table(columns, path)
        return {None: Found(data, None, ("each of its lists is a column", *notes))}
    return {None: _rows([value], path)}


def _rows(values: list[Any], path: Path) -> Found:
    if not values:
        raise FileError(f"{path} has no rows")
    broken = {
        place: f"is a {_named(value)}, where an object ({{...}}) is due"
        for place, value in enumerate(values)
        if not isinstance(value, dict)
    }
    if len(broken) == len(values):
        raise FileError(f"{path} holds a list of {_named(values[0])}s, where objects ({{...}}) are due")
    data, notes = table(columns_of([value if isinstance(value, dict) else {} for value in values]), path)
    return Found(data, None, notes, broken)


def _columns(value: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Columns as lists of as many values, or as pandas writes them, objects of the same keys; else none."""
    parts = list(value.values())
    if all(isinstance(part, list) for part in parts) and len({len(part) for part in parts}) == 1:
        plain = all(not isinstance(item, (list, dict)) for part in parts for item in part)
        return {name: list(part) for name, part in value.items()} if plain and parts[0] else {}
    tables = (
        all(isinstance(part, dict) and part for part in parts) and len({tuple(part) for part in parts}) == 1
    )
    if tables and all(key.isdecimal() for key in parts[0]):
        return {name: list(part.values()) for name, part in value.items()}
    return {}


def _holds_rows(value: dict[str, Any]) -> bool:
    """Whether an object that stands alone on the only line is more than one row."""
    return (
        is_squad(value)
        or (any(map(_is_rows, value.values())) and "messages" not in value)
        or bool(_columns(value))
    )


def _is_rows(value: Any) -> bool:
    chat = {"role", "from", "content", "value"}
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and not (set(item) & chat) for item in value)
    )


def _one_after_another(text: str) -> list[Any] | None:
    """Objects that run over several lines each, one after another, or None where they are none."""
    found: list[Any] = []
    place = 0
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if place == len(text):
            return found if len(found) > 1 else None
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        found.append(value)


def _try(line: str) -> Any:
    try:
        return _loads(line.strip().removesuffix(","))
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKey(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _whole_number(written: str) -> int | str:
    # Python refuses to turn thousands of digits into a number.
    return int(written) if len(written) < 4000 else written


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=Number, parse_int=_whole_number)


def _loads(text: str) -> Any:
    return _DECODER.decode(text)


def _told(error: BaseException) -> str:
    return "it is too deep" if isinstance(error, RecursionError) else str(error)


def _named(value: Any) -> str:
    kinds = {str: "text", int: "number", float: "number", Number: "number", bool: "truth value", list: "list"}
    return kinds.get(type(value), "null")


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
