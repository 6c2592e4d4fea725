"""The columns of the texts and the labels, and the number of each label."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import ClassLabel, Dataset

from lorica.errors import ConfigError, listing, nearest
from lorica.train.data.labels import classes_of, label_finder, label_of, sorted_classes
from lorica.train.data.rows import RowError, Unusable, parsed_cell, read_each

# In order: a data set that has both a pair and a single name is a pair.
PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("text1", "text2"),
    ("text", "text_pair"),
)

TEXTS = (
    "text",
    "sentence",
    "content",
    "review",
    "comment",
    "tweet",
    "body",
    "message",
    "document",
    "question",
    "title",
    "utterance",
)

LABELS = (
    "label",
    "labels",
    "target",
    "class",
    "category",
    "coarse_label",
    "intent",
    "emotion",
    "sentiment",
    "topic",
    "y",
)


def find_texts(rows: Dataset, text: str | None, text_pair: str | None) -> tuple[str, str | None]:
    """Find the text column, or the two of a pair.

    Args:
        rows: the rows.
        text: the column the user named, if any.
        text_pair: the second column the user named, if any.

    Returns:
        The column, and the second one or None.

    Raises:
        ConfigError: a named column does not exist, or no usual name is there and no single column holds text.
    """
    for name in (text, text_pair):
        _check_named(rows, name)
    if text is not None:
        return text, text_pair
    if text_pair is not None:
        raise ConfigError(f"data.text_pair is {text_pair!r}; name the first text too, with data.text")
    columns = by_lower_case(rows)
    for first, second in PAIRS:
        if first in columns and second in columns:
            return columns[first], columns[second]
    for name in TEXTS:
        if name in columns:
            return columns[name], None
    strings = [name for name in rows.column_names if is_text(rows, name) and name.lower() not in LABELS]
    if len(strings) == 1:
        return strings[0], None
    raise ConfigError(
        "cannot tell which column holds the text; name it with --data.text. The columns are: "
        f"{listing(rows.column_names)}{advice(rows.column_names)}"
    )


def by_lower_case(rows: Dataset) -> dict[str, str]:
    """Names of columns by their lower case; of two that are then the same, the one that is in lower case."""
    return {name.lower(): name for name in sorted(rows.column_names, key=str.islower)}


def find_label(rows: Dataset, label: str | None, usual: Sequence[str] = LABELS, what: str = "label") -> str:
    """Find the label column; see `find_column`."""
    return find_column(rows, label, usual, what, "label")


def find_column(rows: Dataset, named: str | None, usual: Sequence[str], what: str, option: str) -> str:
    """Find a column.

    Args:
        rows: the rows.
        named: the column the user named, if any.
        usual: names to look for in lower case, the first found wins.
        what: its name in errors.
        option: field of `DataConfig` that names it.

    Raises:
        ConfigError: the named column does not exist, or no usual name is there.
    """
    _check_named(rows, named)
    if named is not None:
        return named
    columns = by_lower_case(rows)
    for name in usual:
        if name in columns:
            return columns[name]
    raise ConfigError(
        f"cannot tell which column holds the {what}; name it with --data.{option}. The columns are: "
        f"{listing(rows.column_names)}{advice(rows.column_names)}"
    )


def label_names(rows: Dataset, column: str, where: str = "the training rows") -> list[str]:
    """Names of the classes in the order of their ids.

    They are the data set's own if it has any, else the values, sorted; numbers by size.

    Raises:
        RowError: rows have no label, or one that is no class.
        ConfigError: the labels are all the same, or hardly two are, or some differ in case alone.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = Counter(read_each(rows[column], partial(label_of, column=column), where))
    if len(values) < 2:
        raise ConfigError(
            f"all labels in column {column!r} of {where} are {next(iter(values))!r}; classification needs "
            "at least two classes"
        )
    if len(values) > max(1000, len(rows) // 2):
        raise ConfigError(
            f"column {column!r} of {where} has {len(values)} different values in {len(rows)} rows; that is "
            "no set of classes"
        )
    return classes_of(values, column)


def label_ids(rows: Dataset, column: str, names: Sequence[str], where: str) -> list[int]:
    """Id of each row's label.

    A value is looked up among the names. Where none of them is a whole number, a whole number is an id; so is
    one of a data set's own classes, where as many others are named in their place.

    Raises:
        ConfigError: there is no such column.
        RowError: rows have no label, or one that is none of the names.
    """
    needs_column(rows, column, where)
    return read_each(rows[column], label_finder(rows.features[column], names, column), where)


def label_list_names(
    rows: Dataset, column: str, where: str = "the training rows", *, folded: bool = True
) -> list[str]:
    """Names of the classes of a column of lists; see `label_names`.

    Args:
        rows: the rows.
        column: the column of lists.
        where: name of the rows in errors.
        folded: refuse labels that differ in case alone.

    Raises:
        RowError: rows have no list, or a list has a gap.
        ConfigError: no row has a label, or some differ in case alone.
    """
    inner = _inner(rows, column)
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    found = read_each(
        rows[column], lambda items: [label_of(item, column) for item in _items(items, column)], where
    )
    values = Counter(value for items in found for value in items)
    if not values:
        raise ConfigError(f"no row of {where} has a label in column {column!r}")
    return classes_of(values, column) if folded else sorted_classes(values)


def label_list_ids(rows: Dataset, column: str, names: Sequence[str], where: str) -> list[list[int]]:
    """Ids of each row's labels, for a column of lists; see `label_ids`.

    Raises:
        ConfigError: there is no such column.
        RowError: rows have no list, a list has a gap, or a label is none of the names.
    """
    needs_column(rows, column, where)
    find = label_finder(_inner(rows, column), names, column)
    return read_each(rows[column], lambda items: [find(item) for item in _items(items, column)], where)


def numbers(rows: Dataset, column: str, where: str) -> list[float]:
    """The numbers of a column.

    Raises:
        ConfigError: there is no such column.
        RowError: rows have none.
    """
    needs_column(rows, column, where)

    def read(value: Any) -> float:
        # A csv file's numbers come as texts.
        number = _float(value) if isinstance(value, (int, float, str)) else math.nan
        if isinstance(value, bool) or not math.isfinite(number):
            got = "nothing" if value in (None, "") else f"{value!r:.60}"
            comma = isinstance(value, str) and math.isfinite(_float(value.replace(",", ".")))
            hint = "; it is written with a point, such as 2.5" if comma else ""
            raise Unusable(f"has {got} in column {column!r}, where a number is due{hint}")
        return number

    return read_each(rows[column], read, where)


def check_texts(rows: Dataset, columns: Sequence[str], where: str, *, filled: bool = False) -> None:
    """Refuse rows whose text is missing or is no text.

    Args:
        rows: the rows.
        columns: where the texts stand.
        where: name of the rows in errors.
        filled: refuse rows all of whose texts are empty or blank, too.

    Raises:
        ConfigError: a column is missing.
        RowError: rows' text is null or not a string, or empty.
    """
    for column in columns:
        needs_column(rows, column, where)
        read_each(rows[column], partial(text_of, column=column), where)
    if filled:
        blank = [
            row
            for row, each in enumerate(zip(*(rows[c] for c in columns), strict=True))
            if not any(map(str.strip, each))
        ]
        if blank:
            raise RowError(blank, where, f"has an empty text in column {columns[0]!r}")


def text_of(value: Any, column: str) -> str:
    """A text.

    Raises:
        Unusable: it is none.
    """
    if not isinstance(value, str):
        got = "nothing" if value is None else f"{value!r:.60}"
        raise Unusable(f"has {got} in column {column!r}, where a text is due")
    return value


def advice(columns: Sequence[str]) -> str:
    """Advice for an error about columns: the task that learns from rows of this form, if one is known."""
    names = {name.lower() for name in columns}
    known = (
        (("messages",), "--task causal-lm"),
        (("conversations",), "--task causal-lm"),
        (("chosen", "rejected"), "--task preference"),
        (("question", "context", "answers"), "--task question-answering"),
        (("tokens", "ner_tags"), "--task token-classification"),
        (("tokens", "tags"), "--task token-classification"),
        (("prompt", "completion"), "--task causal-lm"),
        (("prompt", "response"), "--task causal-lm"),
        (("instruction", "output"), "--task causal-lm"),
        (("instruction", "response"), "--task causal-lm"),
        (("question", "answer"), "--task causal-lm"),
    )
    task = next((task for form, task in known if names.issuperset(form)), None)
    return "" if task is None else f". Rows of this form are for {task}"


def needs_column(rows: Dataset, column: str, where: str) -> None:
    """Refuse rows that lack a column.

    Raises:
        ConfigError: they do.
    """
    if column not in rows.column_names:
        raise ConfigError(
            f"there is no column {column!r} in {where}{nearest(column, rows.column_names)}; the columns are: "
            f"{listing(rows.column_names)}"
        )


def _float(value: float | str) -> float:
    try:
        # Python reads 1_000 as a number.
        return math.nan if isinstance(value, str) and "_" in value else float(value)
    except ValueError:
        return math.nan


def _check_named(rows: Dataset, name: str | None) -> None:
    if name is not None:
        needs_column(rows, name, "the training rows")


def is_text(rows: Dataset, column: str) -> bool:
    """Whether a column holds texts; those of a csv file may all be numbers, which are none."""
    if getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
        return False
    return any(value and math.isnan(_float(value)) for value in rows[column])


def _inner(rows: Dataset, column: str) -> Any:
    feature = rows.features[column]
    return getattr(feature, "feature", feature)


def _items(value: Any, column: str) -> list[Any]:
    value = parsed_cell(value)
    if not isinstance(value, list):
        got = "nothing" if value is None else f"{value!r:.60}"
        raise Unusable(f'has {got} in column {column!r}, where a list is due, such as ["a", "b"]')
    return value
