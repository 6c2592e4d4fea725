"""Scores of SQL queries of WikiSQL's kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

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
