"""Classes by their labels, each with its place as its number: found as they are written, looked up with care.

Outer spaces are no part of a label. Labels that differ in case alone are refused where they would become
classes, but for the words "true" and "false", and taken for one another where the classes are named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import ClassLabel

from lorica.errors import ConfigError, listing, nearest
from lorica.train.data.rows import Unusable

UNKNOWN = "which the training rows do not have"
"""The error of a label that is none of the classes."""

_TRUTH = {"true": "True", "false": "False"}


def label_of(value: Any, column: str) -> int | str:
    """A label as a name or a whole number.

    Raises:
        Unusable: it is none.
    """
    value = value.strip() if isinstance(value, str) else value
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise Unusable(f"has no label in column {column!r}")
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise Unusable(
                f"has the label {value} in column {column!r}; classes must be names or whole numbers. "
                "Numbers to predict are a task of their own: --task regression"
            )
        return int(value)
    if isinstance(value, (int, str)):
        return value
    raise Unusable(
        f"has a {type(value).__name__} in column {column!r} as its label; expected one name or whole number"
        + (". Several labels a row are --task multi-label-classification" if isinstance(value, list) else "")
    )


def classes_of(counts: Mapping[int | str, int], column: str) -> list[str]:
    """Names of the classes: the labels, sorted; whole numbers by size.

    Args:
        counts: label → number of rows that have it.
        column: where they stand.

    Raises:
        ConfigError: labels differ in case alone.
    """
    alike: dict[str, list[str]] = {}
    for value in counts:
        alike.setdefault(str(value).casefold(), []).append(str(value))
    unclear = [spelt for key, spelt in alike.items() if len(spelt) > 1 and key not in _TRUTH]
    if unclear:
        often = {str(value): count for value, count in counts.items()}
        told = " and ".join(f"{name!r} ({often[name]:,} rows)" for name in sorted(unclear[0]))
        one = [max(spelt, key=lambda name: often[name]) for spelt in alike.values()]
        raise ConfigError(
            f"the labels {told} in column {column!r} differ in case alone"
            + (f", and {len(unclear) - 1} more such groups" if len(unclear) > 1 else "")
            + f". Write them alike; or name the classes, which takes them for one: --data.labels "
            f"'[{listing(sorted(one), limit=9)}]'; naming both keeps them apart"
        )
    return sorted_classes(spelt[0] if len(spelt) == 1 else _TRUTH[key] for key, spelt in alike.items())


def sorted_classes(names: Iterable[int | str]) -> list[str]:
    """Names of classes, sorted; whole numbers by size."""
    texts = [str(name) for name in names]
    return sorted(texts, key=int) if all(map(_whole, texts)) else sorted(texts)


def label_finder(feature: Any, names: Sequence[str], column: str) -> Callable[[Any], int]:
    """A function that returns a label's place among the names of the classes, or raises `Unusable`.

    Args:
        feature: type of the labels, which may have names of its own.
        names: of the classes.
        column: where the labels stand.
    """
    # Where names are numbers, a number that is none of them is a class that the training rows lack.
    places = 0 if any(name.removeprefix("-").isdecimal() for name in names) else len(names)
    own = list(feature.names) if isinstance(feature, ClassLabel) else []
    if len(own) == len(names) and not set(own) & set(names):
        own = list(names)  # the classes were given other names
    ids = {name: i for i, name in enumerate(names)}
    folded = Counter(name.casefold() for name in names)
    loose = {name.casefold(): i for name, i in ids.items() if folded[name.casefold()] == 1}
    return partial(_find_label, own=own, ids=ids, loose=loose, places=places, column=column)


def notes_on_labels(values: Iterable[Any], names: Sequence[str], column: str) -> list[str]:
    """Notes on labels that are not written as the classes they are taken for, or that look alike.

    Args:
        values: the labels, as they are written.
        names: of the classes.
        column: where the labels stand.
    """
    known, folded = set(names), {name.casefold(): name for name in names}
    written = Counter(value for value in values if isinstance(value, str) and value not in known)
    taken = [
        f"{value!r} is read as {name!r} ({count:,} times)"
        for value, count in written.items()
        if (name := next((n for n in (value.strip(),) if n in known), folded.get(value.strip().casefold())))
    ]
    notes = [f"labels in column {column!r}: {listing(taken, limit=5)}"] if taken else []
    numbers: dict[float, list[str]] = {}
    for name in names:
        if (number := _number(name)) is not None:
            numbers.setdefault(number, []).append(name)
    same = [" and ".join(map(repr, spelt)) for spelt in numbers.values() if len(spelt) > 1]
    if same:
        notes.append(
            f"classes that are written otherwise and are the same number stay apart: {listing(same, limit=5)}"
        )
    return notes


def _find_label(
    raw: Any, own: list[str], ids: dict[str, int], loose: dict[str, int], places: int, column: str
) -> int:
    if isinstance(raw, int) and 0 <= raw < len(own):
        raw = own[raw]
    if isinstance(raw, str) and raw in ids:
        return ids[raw]
    value = label_of(raw, column)
    if str(value) in ids:
        return ids[str(value)]
    if _whole(str(value)) and 0 <= int(value) < places:
        return int(value)
    if (place := loose.get(str(value).casefold())) is not None:
        return place
    hint = nearest(str(value), ids)
    raise Unusable(
        f"has the label {value!r} in column {column!r}, {UNKNOWN}{hint or '; they have ' + listing(ids)}"
    )


def _whole(text: str) -> bool:
    """Whether a text is a whole number as numbers are written."""
    digits = text.removeprefix("-")
    return (
        digits.isascii() and digits.isdecimal() and len(digits) < 19 and (digits == "0" or digits[0] != "0")
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
